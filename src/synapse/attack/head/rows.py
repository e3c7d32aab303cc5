"""Whole rows of the head exchanged, scaled, turned and emptied, and what an edit of it costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from synapse.attack.base import RANDOM_DRAWS
from synapse.attack.head.redirect import check_features
from synapse.types import Activations, Manipulation


@dataclass(frozen=True)
class EditBudget:
    """How large a change of a weight matrix is, in the ways in which attackers pay for it."""

    frobenius: float
    """||dW||_F / ||W||_F."""
    spectral: float
    """Largest singular value of dW over that of W."""
    largest: float
    """Largest entry of |dW| over that of |W|."""
    rows: int
    """Rows that change."""
    entries: int
    """Entries that change: L0."""


def edit_budget(change: Float[np.ndarray, "label feature"], weight: Float[np.ndarray, "label feature"]) -> EditBudget:
    """Return the size of a change of the weight matrix, relative to it."""
    return EditBudget(
        frobenius=float(np.linalg.norm(change) / np.linalg.norm(weight)),
        spectral=float(np.linalg.norm(change, 2) / np.linalg.norm(weight, 2)),
        largest=float(np.abs(change).max() / np.abs(weight).max()),
        rows=int((change != 0).any(axis=1).sum()),
        entries=int((change != 0).sum()),
    )


def row_attacks(
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    bias: Float[np.ndarray, "label"],
    *,
    seed: int,
    factors: Sequence[float] = (0.5, 2.0),
) -> list[Manipulation]:
    """Return the logits with rows of the head (and their biases) exchanged, scaled, turned and emptied.

    Each stands beside Gaussian changes of the same rows and the same norm. Exchanging two rows exchanges two logits, so
    that what it does follows from the clean predictions. Budgets are those of `edit_budget`, of the matrix with the
    bias as one more column; a head without a bias has zeros there.
    """
    check_features(test)
    assert test.features is not None
    head = np.column_stack([weight, bias]).astype(np.float64)
    inputs = np.column_stack([np.asarray(test.features, dtype=np.float64), np.ones(len(test))])
    z, rng, found = test.known_logits.astype(np.float64), np.random.default_rng(seed), []
    for attack, detail, edit in _row_edits(head, test.labels, factors):
        touched = (edit != 0).any(axis=1)
        drawn = rng.standard_normal((RANDOM_DRAWS, *head.shape)) * touched[:, None]
        drawn *= np.linalg.norm(edit) / np.maximum(np.linalg.norm(drawn, axis=(1, 2), keepdims=True), 1e-300)
        for arm, edits in (("attack", edit[None]), ("random", drawn)):
            logits = z + np.einsum("dlf,ef->del", edits, inputs)
            budget = {name: float(size) for name, size in asdict(edit_budget(edits[0], head)).items()}
            found.append(Manipulation(attack, "head", detail, arm, budget, logits))
    return found


def _row_edits(
    head: Float[np.ndarray, "label column"], labels: tuple[str, ...], factors: Sequence[float]
) -> list[tuple[str, str, Float[np.ndarray, "label column"]]]:
    """Return the attacks' names, what they touch, and the changes of the matrix."""
    found = []
    for a, b in combinations(range(len(labels)), 2):
        edit = np.zeros_like(head)
        edit[a], edit[b] = head[b] - head[a], head[a] - head[b]
        found.append(("row-swap", f"{labels[a]} <-> {labels[b]}", edit))
    scales = [("row-zero", 0.0), ("row-sign", -1.0), *((f"row-scale-{factor:g}", factor) for factor in factors)]
    for name, factor in scales:
        for row, label in enumerate(labels):
            edit = np.zeros_like(head)
            edit[row] = (factor - 1) * head[row]
            found.append((name, label, edit))
    return found
