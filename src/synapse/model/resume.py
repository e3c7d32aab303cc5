"""Run a classifier from one of its blocks on: what lies below an edit is never computed twice.

One clean pass of a batch keeps the output of every block. A run whose first change is at layer l starts there: the
embedding and the blocks up to l are passed over, the model's own code does the rest. Nothing here knows an
architecture, and many edited copies of an example share one forward pass.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import edited_outputs, passed_over


@dataclass(frozen=True, eq=False)
class CleanPass:
    """The outputs of every block for one batch, (example, token, unit) each, and the logits."""

    batch: Batch
    states: tuple[Tensor, ...]
    logits: Float[Tensor, "example label"]
    features: Float[Tensor, "example feature"] | None

    @property
    def n_tokens(self) -> int:
        """Number of token rows, padding included."""
        return int(self.states[0].shape[1])

    def take(self, examples: Int[np.ndarray, "chosen"]) -> "CleanPass":
        """Return the same pass for the chosen examples of the batch."""
        chosen = torch.from_numpy(examples).to(self.logits.device)
        return CleanPass(
            self.batch.take(chosen),
            tuple(states[chosen] for states in self.states),
            self.logits[chosen],
            None if self.features is None else self.features[chosen],
        )


def clean_pass(classifier: Classifier, batch: Batch) -> CleanPass:
    """Return the block outputs of one unperturbed forward pass, and the input of the final linear map."""
    states: list[Tensor] = []
    features: list[Tensor] = []
    final = classifier.final
    handles = []
    if final is not None:
        handles.append(final.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0])))
    try:
        # Copies: a block that works in place would change what the one before it returned.
        keep = [(block, lambda hidden: states.append(hidden.clone())) for block in classifier.blocks]
        with edited_outputs(keep):
            logits = classifier.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    rows = classifier.readout_rows(batch, states[0].shape[1])
    return CleanPass(batch, tuple(states), logits, _at_rows(features[0], rows) if features else None)


def resume(
    classifier: Classifier,
    clean: CleanPass,
    layer: int,
    states: Float[Tensor, "run token unit"],
    example: Int[Tensor, "run"],
) -> Float[Tensor, "run label"]:
    """Return the logits of runs that take `states` for the output of block `layer`.

    `example[r]` says which example of the clean batch run r is about; the blocks above `layer` and the head compute on
    its inputs (masks, positions), whatever is applied to them.
    """
    batch = clean.batch.take(example)
    below = list(classifier.blocks[: layer + 1])
    anatomy = classifier.anatomy
    embedding = [] if anatomy.embedding is None else [classifier.module.get_submodule(anatomy.embedding)]
    with passed_over(embedding, states), passed_over(below, anatomy.block_output(states)):
        return classifier.forward(batch)


def _at_rows(features: Tensor, rows: Int[Tensor, "example"]) -> Float[Tensor, "example feature"]:
    """Return one row of features an example: a final map that runs on every token is read at the readout row."""
    if features.ndim == 2:
        return features
    return features[torch.arange(len(rows), device=rows.device), rows]
