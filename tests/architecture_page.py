"""Write docs/architectures.md from the table of architectures: `python tests/architecture_page.py` (make
architectures).

Each line says what was found in the live model; `tests/model/test_architectures.py` holds the page against it.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from architectures import N_LABELS, TABLE, Architecture

from synapse.data.examples import Examples
from synapse.errors import AnatomyError
from synapse.model.classifier import Classifier
from synapse.model.resume import clean_pass
from synapse.ranking.base import Ranking
from synapse.recording import record
from synapse.sweeping import Cell, Kind, sweep
from synapse.types import Neurons

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"

HEAD = """# Architectures

SYNAPSE has no table of architectures: it finds blocks, readout rows, head and inner sites by structure and behaviour,
and proves them on load (see [the method](method.md)). This page is made from the table of its tests (`make
architectures`): {n} tiny random models, built from the model library's own classes or from plain PyTorch. For each of
the {understood} that are understood the tests check, against names that were read in the source of the model: as many
blocks as configured; recorded states bitwise equal to the library's `hidden_states` where it gives them; an edit that
changes nothing leaves the logits bitwise equal; an edit at every site moves them as a plain hook there does; last state
and head give the logits; a run resumed from any block, and a sweep of every site, equal the full forward (1e-5);
batches and padding do not change predictions; hooks and weights are as they were after an error in the middle of a
pass.

- *readout*: the rows of the last block's output that move the logits. Where these are several, a neuron's value is its
  mean over them, and an edit of the readout acts on all of them.
- *mlp*: the hidden units of the feed-forward network, by their number; *heads*: the heads side by side. A dash: no
  module carries it (`synapse inspect` says why).
- *padding*: `shared` - examples of unequal length share batches; `one length` - padding would move this model's logits,
  or its rows cannot be told from padding, so a batch holds examples of one length; `fixed` - all examples have as many
  rows.
- *reuse*: which rows a sweep need not compute again, beside all that lies below an edit, which it never does. `last
  block` - there only the row that the head reads is computed, and where an edit of that row meets the first block
  behind it, the projections of the other rows are taken over; `every block` - an edit of that row reaches no other one,
  so it alone is computed in all blocks (causal decoders); `head` - behind the last block the head runs on that row
  alone, but the attention does not pass PyTorch's `scaled_dot_product_attention`, or a block has several; a dash: the
  head reads several rows, and all are computed. The tests hold all of it against the plain hooked forward.
- *hidden states*: how many of the library's own states are the plain outputs of blocks, and were compared.

Measured with transformers {transformers} and torch {torch}.

| architecture | blocks | readout | mlp | attention | heads | padding | reuse | hidden states | note |
|---|---|---|---|---|---|---|---|---|---|
"""


def classifier_of(row: Architecture) -> Classifier:
    """Return the row's model as a classifier; a model of a kind that is refused raises AnatomyError."""
    return Classifier.from_module(
        row.build(),
        preprocess=row.preprocess,
        labels=tuple("abc")[:N_LABELS],
        sample=row.inputs(4, 99),
        name=row.name,
    )


def line(row: Architecture, classifier: Classifier) -> str:
    """Return the row's line of the page, as found in the live classifier."""
    anatomy = classifier.anatomy
    padding = "fixed" if not anatomy.n_tokens_follow_length else "shared" if anatomy.pads else "one length"
    mlp = anatomy.sites["mlp"][0].width if "mlp" in anatomy.sites else "–"
    compared = f"{row.n_comparable} of {row.n_blocks}" if row.hidden_states is not None else "–"
    is_partly = row.n_comparable < row.n_blocks
    note = "; ".join(text for text in (row.note, row.hidden_states_note if is_partly else "") if text)
    attention = "yes" if "attention" in anatomy.sites else "–"
    shared = " (one, shared)" if len(set(anatomy.blocks)) == 1 < len(anatomy.blocks) else ""
    cells = (row.name, f"{classifier.n_layers}{shared}", anatomy.readout, mlp, attention, anatomy.n_heads or "–")
    return "| " + " | ".join(str(cell) for cell in (*cells, padding, reuse_of(row, classifier), compared, note)) + " |"


def reuse_of(row: Architecture, classifier: Classifier) -> str:
    """Return which rows a sweep of the row's model takes over, in a word: what proved itself in the last layers."""
    labels = tuple(classifier.labels[i % N_LABELS] for i in range(6))
    train, test = (Examples(row.inputs(6, seed), labels, f"{seed}") for seed in (2, 3))
    reference = record(classifier, train)
    half = tuple(range(0, classifier.width, 2))
    cells = [
        Cell(Neurons(layer, half), "readout", Kind("zero"), "", "", "top", -1, 0.5)
        for layer in range(classifier.n_layers - 2, classifier.n_layers)
    ]
    scores = np.zeros((classifier.n_layers, 1 + N_LABELS, classifier.width))
    ranking = Ranking("none", scores, classifier.labels, reference.source)
    last_block, head = sweep(classifier, test, ranking, reference=reference, cells=cells).reuse.values()
    if last_block != "rows":
        return "head" if head == "rows" else "–"
    clean = clean_pass(classifier, next(iter(classifier.batches(test.inputs))), reuse="residual")
    return "every block" if clean.row_is_alone_from == 0 else "last block"


def refused_line(row: Architecture) -> str:
    """Return the line of a row whose model is refused."""
    return f"| {row.name} | refused | | | | | | | | {row.note} |"


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    families = dict.fromkeys(row.family for row in TABLE)
    text = HEAD.format(
        n=len(TABLE),
        understood=sum(row.refused is None for row in TABLE),
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
    )
    for family in families:
        text += f"| **{family}** | | | | | | | | | |\n"
        for row in (row for row in TABLE if row.family == family):
            try:
                text += line(row, classifier_of(row)) + "\n"
            except AnatomyError:
                text += refused_line(row) + "\n"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
