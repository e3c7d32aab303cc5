"""synapse itself, through the functions that its attacks are made with."""

from time import perf_counter

import numpy as np

from peers.attack_tasks import BestBits, BitTask, Edits, EditTask, FoundEdits, PairTask
from peers.ours_probe import OurSide
from synapse.attack.activation import smallest_edits
from synapse.attack.bits.candidates import best_flips, offsets_of
from synapse.attack.head import FittedStep, Keys, key_covariance, redirect_head, required_step


class BitScoring(OurSide):
    """`best_flips`, which scores all bits of all weights."""

    def run(self, task: BitTask) -> BestBits:
        """Return the best flips of every bit."""
        found = best_flips(task.stored, task.gradients, task.bits, each_bit=task.each_bit)
        offsets = offsets_of(task.stored)
        promise, places = [], []
        for bit in task.bits:
            of_bit = [i for i, place in enumerate(found.places) if place.bit == bit]
            best = sorted(of_bit, key=lambda i: -found.promise[i])
            promise.append(found.promise[best])
            places.append([offsets[found.places[i].tensor] + found.places[i].weight for i in best])
        return BestBits(np.array(promise), np.array(places))


class HeadPairs(OurSide):
    """Fitted steps, as `redirect_head` chooses them.

    Peers have neither controls nor a score, so that the call itself, which has both, is timed beside it.
    """

    def run(self, task: PairTask) -> Edits:
        """Return the edits, what `redirect_head` says that they need, and its time."""
        start = perf_counter()
        features = task.train.features.astype(np.float64)
        covariance = key_covariance(features)
        edits = {case: self._edit(task, features, covariance, *case) for case in task.cases}
        fitted = perf_counter()
        redirections = redirect_head(FittedStep(), task.train, task.test, task.weight, seed=0, shares=task.shares)
        whole = perf_counter() - fitted
        index = task.test.labels.index
        said = {
            (index(one.source), index(one.target), one.share): float(
                np.quantile(one.needed[0], one.share, method="inverted_cdf")
            )
            for one in redirections
            if one.arm == "attack"
        }
        return Edits(edits, said, fitted - start, whole)

    def _edit(
        self, task: PairTask, features: np.ndarray, covariance: np.ndarray, source: int, target: int, share: float
    ) -> np.ndarray:
        chosen = task.fitting(source)
        required = required_step(task.train.known_logits[chosen], source, target)
        keys = Keys(features, covariance, task.train.targets, chosen, required, share)
        return FittedStep().edit(keys, source, target, len(task.weight))


class SmallestEdits(OurSide):
    """`smallest_edits` without random directions, which no peer draws."""

    def run(self, task: EditTask) -> FoundEdits:
        """Return the edits."""
        return FoundEdits(smallest_edits(task.classifier, task.examples, layer=task.layer, draws=0).edits)
