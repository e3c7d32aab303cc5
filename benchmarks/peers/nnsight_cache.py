"""nnsight: `tracer.cache` of all blocks, a trace a batch."""

from typing import ClassVar

import numpy as np
import torch
from nnsight import NNsight

from peers.record_tasks import Recording, RecordSide, RecordTask, first_rows


class NnsightCache(RecordSide):
    """It caches the states of all tokens; row 0 is taken before the next batch, so that memory does not fill up.

    nnsight makes no batches: it gets the buckets of synapse.
    """

    name: ClassVar[str] = "nnsight"
    package: ClassVar[str] = "nnsight"

    def __init__(self, task: RecordTask) -> None:
        super().__init__(task)
        self.model = NNsight(task.module)
        self.envoys = [self.model.get(block) for block in task.blocks]

    def run(self, task: RecordTask) -> Recording:
        """Return the states of all layers."""
        states = np.empty(task.shape, dtype=np.float32)
        for index, inputs in task.batches():
            with torch.inference_mode(), self.model.trace(**inputs) as tracer:
                cache = tracer.cache(modules=self.envoys)
            for layer, envoy in enumerate(self.envoys):
                states[layer, index] = first_rows(cache[envoy.path].output).numpy()
        return Recording(states.copy)
