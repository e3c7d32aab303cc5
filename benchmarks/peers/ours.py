"""synapse itself, through the call that everybody has: `syn.sweep`."""

from typing import Any, ClassVar

import synapse as syn
from peers.base import Answer, Task
from peers.side import Side


class Ours(Side):
    """One call of `syn.sweep`: it makes its batches, runs clean, proves its short cuts and runs the cells."""

    name: ClassVar[str] = "synapse"
    package: ClassVar[str] = "synapse"

    def __init__(self, classifier: syn.Classifier, ranking: syn.Ranking, reference: Any) -> None:
        self.classifier = classifier
        self.ranking = ranking
        self.reference = reference
        self.run_plain: tuple[str, ...] = ()

    def run(self, task: Task) -> Answer:
        """Return the logits: what is timed."""
        sweep = syn.sweep(
            self.classifier, task.examples, self.ranking, reference=self.reference, cells=task.sweep_cells
        )
        self.run_plain = sweep.run_plain
        return Answer(sweep.logits, sweep.clean_logits)
