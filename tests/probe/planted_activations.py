"""Activations whose layers are known: the first is noise, the second carries the class in unit 3."""

import numpy as np

from synapse.types import Activations

LABELS = ("a", "b", "c")


def planted(n=150, *, seed=0, source="train", labels=LABELS):
    random = np.random.default_rng(seed)
    targets = np.arange(n) % 3
    values = random.normal(size=(2, n, 8)).astype(np.float32)
    values[1, :, 3] += 20.0 * targets
    logits = random.normal(size=(n, len(labels))).astype(np.float32)
    return Activations(values, logits, targets, labels, source)
