"""Changes without a strength to search for: what they do, beside random changes of the same size."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from synapse.types import Activations


@dataclass(frozen=True, eq=False)
class Manipulation:
    """What one fixed change made of the logits: `logits[d, i]` is example i under draw d.

    A change that was chosen has one draw (arm `attack`), its random control several (arm `random`). `detail` says what
    was changed (`b <-> c`), `budget` how large the change is, by the name of the measure.
    """

    attack: str
    location: str
    detail: str
    arm: str
    budget: Mapping[str, float]
    logits: Float[np.ndarray, "draw example label"]

    def flip_rate(self, clean: Activations) -> float:
        """Return the share of predictions that are not what they were, over all draws."""
        return float((self._predicted != clean.predictions).mean())

    def success(self, clean: Activations, source: int | None, target: int) -> float:
        """Return the share predicted as the target now, of the examples that were not; with a source, of its examples.

        NaN where there is no such example. Source: the attack success rate P(pred' = t | pred != t [, y = s]) of Rakin
        et al., T-BFA (2020).
        """
        asked = clean.predictions != target
        if source is not None:
            asked &= clean.targets == source
        return float((self._predicted[:, asked] == target).mean()) if asked.any() else float("nan")

    def collateral(self, clean: Activations, source: int | None = None) -> float:
        """Return the accuracy lost on the examples of all classes but the source; negative where it is gained."""
        others = np.ones(len(clean), dtype=bool) if source is None else clean.targets != source
        before = clean.predictions[others] == clean.targets[others]
        after = self._predicted[:, others] == clean.targets[others]
        return float(before.mean() - after.mean()) if others.any() else float("nan")

    @property
    def _predicted(self) -> Int[np.ndarray, "draw example"]:
        return np.asarray(self.logits.argmax(axis=2))
