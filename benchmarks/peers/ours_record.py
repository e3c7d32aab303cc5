"""synapse itself, through the call that everybody has: `syn.record`."""

from functools import partial
from typing import Any, ClassVar

import numpy as np

import synapse as syn
from peers.record_tasks import Recording, RecordSide, RecordTask


class Recorder(RecordSide):
    """One call of `syn.record`: it makes its batches, runs them, and keeps all there is in a new folder."""

    name: ClassVar[str] = "synapse"
    package: ClassVar[str] = "synapse"

    @property
    def setting(self) -> str:
        """Where the activations go."""
        return "kept on disk"

    def run(self, task: RecordTask) -> Recording:
        """Return the states of all layers."""
        activations = syn.record(task.classifier, task.examples, keep=task.new_folder())
        return Recording(partial(_stacked, activations))


def _stacked(activations: Any) -> np.ndarray:
    return np.stack([activations.values[layer] for layer in range(activations.n_layers)])
