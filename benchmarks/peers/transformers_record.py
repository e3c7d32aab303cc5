"""The model library: its bare forward, which is the floor, and its feature-extraction pipeline."""

from typing import Any, ClassVar

import numpy as np
import torch
from transformers import pipeline

from peers.record_tasks import Recording, RecordSide, RecordTask


class BareForward(RecordSide):
    """The forward passes that cannot be left out: synapse's buckets, tokenised and run; their logits are kept."""

    name: ClassVar[str] = "bare forward"
    package: ClassVar[str] = "transformers"

    def run(self, task: RecordTask) -> Recording:
        """Return nothing: no state is looked at."""
        logits = torch.empty(len(task.examples), len(task.classifier.labels))
        with torch.inference_mode():
            for index, inputs in task.batches():
                logits[torch.from_numpy(index)] = self.module(**inputs).logits
        return Recording()


class FeaturePipeline(RecordSide):
    """The pipeline, on texts in their order, in batches of one size: it gives lists of numbers, as by default.

    They are the last block's states of all tokens; of the other blocks it gives none. It cuts texts at what the
    tokenizer allows, as all sides do. It is iterated, as the lists of all texts together would take much memory.
    """

    name: ClassVar[str] = "pipeline"
    package: ClassVar[str] = "transformers"

    def __init__(self, task: RecordTask) -> None:
        super().__init__(task)
        base: Any = task.module.base_model
        self.pipe = pipeline("feature-extraction", model=base, tokenizer=task.tokenizer, device=task.device)
        self.together = task.batch_size

    def run(self, task: RecordTask) -> Recording:
        """Return the states of the last layer."""
        states = np.empty(task.shape[1:], dtype=np.float32)
        texts = (text for text in task.examples.inputs)
        for row, tokens in enumerate(self.pipe(texts, batch_size=self.together, truncation=True)):
            states[row] = tokens[0][0]
        return Recording(states[None].copy, last_only=True)
