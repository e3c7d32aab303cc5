"""An executor that does what another process would: everything travels, and items come back in an odd order."""

import pickle
from dataclasses import dataclass

import numpy as np

import synapse.model.replica as replica
from synapse.execute import Executor
from synapse.execute.base import build, outcome_of


@dataclass
class Elsewhere(Executor):
    """Runs copies of items on copies of what is shared, in a random order; `fails` names positions that are lost."""

    seed: int = 0
    workers: int = 2
    is_remote = True
    maps: int = 0

    def map(self, work, items, *, shared=None, report=None):
        """Yield what became of every item."""
        self.maps += 1
        replica._built.clear()  # another process has built nothing
        built, items = build(travelled(shared)), list(items)
        for position in np.random.default_rng(self.seed).permutation(len(items)).tolist():
            yield travelled(outcome_of(work, built, position, travelled(items[position])))


def travelled(value):
    """Return what arrives of a value that is sent."""
    return pickle.loads(pickle.dumps(value))
