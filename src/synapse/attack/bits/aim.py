"""Whom an attack is about, what it is to lower, and what came of it."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synapse.attack.base import attacked
from synapse.attack.logits import gaps
from synapse.types import Activations


def nearest_pairs(recorded: Activations) -> list[tuple[int, int]]:
    """Return the pairs of source and target, first those whose logits are nearest: whose right answers lack least.

    What counts is what all but 5 % of them lack. Sources without a right answer have no pair.
    """
    lacking = {
        (source, to): float(np.quantile(gaps(recorded.known_logits[chosen], to), 0.95))
        for source, to in permutations(range(len(recorded.labels)), 2)
        if len(chosen := attacked(recorded, source, to))
    }
    return sorted(lacking, key=lambda ends: lacking[ends])


@dataclass(frozen=True)
class Outcome:
    """What flips did to one set of examples, as counts.

    Of `attacked` examples `redirected` are predicted as wanted; of `others`, which the unflipped weights get right,
    `lost` are wrong now. `nonfinite` of both have a logit that is NaN or infinite: those count as lost, and as
    redirected only where no target was named.
    """

    redirected: int
    attacked: int
    lost: int
    others: int
    nonfinite: int

    @property
    def success(self) -> float:
        """Share of the attacked examples that are redirected; NaN where there are none."""
        return self.redirected / self.attacked if self.attacked else float("nan")

    @property
    def collateral(self) -> float:
        """Share of the others that are lost; NaN where there are none."""
        return self.lost / self.others if self.others else float("nan")


@dataclass(frozen=True, eq=False)
class Aim:
    """Whom an attack is about, among examples whose predictions without a flip are known.

    `attacked` are to be predicted as `target`, or (None) as anything but their class; `others` are to stay as they are.
    """

    targets: Int[np.ndarray, "example"]
    attacked: Bool[np.ndarray, "example"]
    others: Bool[np.ndarray, "example"]
    target: int | None

    @classmethod
    def of(
        cls,
        targets: Int[np.ndarray, "example"],
        logits: Float[np.ndarray, "example label"],
        source: int | None,
        target: int | None,
    ) -> "Aim":
        """Return the aim at those that the unflipped weights get right; towards a target without a source: at all of
        other classes that are not predicted as the target already."""
        predicted = predictions(logits)
        right = predicted == targets
        if source is not None:
            return cls(targets, right & (targets == source), right & (targets != source), target)
        attacked = right if target is None else (targets != target) & (predicted != target)
        return cls(targets, attacked, np.zeros(len(targets), dtype=bool), target)

    def outcome(self, logits: Float[np.ndarray, "example label"]) -> Outcome:
        """Return what the logits say of the attacked examples and of the others."""
        predicted = predictions(logits)
        is_hit = predicted != self.targets if self.target is None else predicted == self.target
        concerned = self.attacked | self.others
        return Outcome(
            redirected=int((is_hit & self.attacked).sum()),
            attacked=int(self.attacked.sum()),
            lost=int(((predicted != self.targets) & self.others).sum()),
            others=int(self.others.sum()),
            nonfinite=int(((predicted < 0) & concerned).sum()),
        )

    def take(self, examples: Int[np.ndarray, "chosen"]) -> "Aim":
        """Return the aim at some of the examples."""
        return Aim(self.targets[examples], self.attacked[examples], self.others[examples], self.target)

    def loss(self, stealth: float, margin: float, limit: float = float("inf")) -> "Loss":
        """Return what flips are to lower: what the attacked examples lack on average, and `stealth` times the others.

        An example lacks what its wanted class is less than `margin` ahead of all others; with no target, what its own
        class is not yet that much behind another. None lacks more than the `limit`.
        """
        wanted = self.targets if self.target is None else np.where(self.attacked, self.target, self.targets)
        signs = np.where(self.attacked & (self.target is None), -1.0, 1.0)
        weights = self.attacked / max(1, self.attacked.sum()) + stealth * self.others / max(1, self.others.sum())
        return Loss(
            torch.from_numpy(wanted),
            torch.from_numpy(signs.astype(np.float32)),
            torch.from_numpy(weights.astype(np.float32)),
            margin,
            limit,
        )


def predictions(logits: Float[np.ndarray, "example label"]) -> Int[np.ndarray, "example"]:
    """Return the predicted classes; -1 where a logit is NaN or infinite."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


def usual_margin(logits: Float[np.ndarray, "example label"]) -> float:
    """Return how far the predicted class usually is ahead of the next: the median."""
    ordered = np.sort(logits, axis=1)
    return float(np.median(ordered[:, -1] - ordered[:, -2]))


@dataclass(frozen=True, eq=False)
class Loss:
    """A weighted sum of what examples lack: max(0, margin - sign * (z_wanted - max of the other z)).

    It is zero, and so is its gradient, for an example that is safely where it should be. Cross-entropy would go on
    asking for more there, and would ask next to nothing for others that are still right by a little. The value counts
    at most `limit` for an example, since lost is lost: an exponent's flip that is right for nearly all of them may move
    the logits of the last ones by 1e36. The gradient knows no limit, or it would never bring these back.
    """

    wanted: Int[Tensor, "example"]
    signs: Float[Tensor, "example"]
    weights: Float[Tensor, "example"]
    margin: float
    limit: float

    def of(self, logits: Float[Tensor, "chosen label"], examples: Int[np.ndarray, "chosen"]) -> Float[Tensor, ""]:
        """Return the part of the loss that is due to some examples."""
        chosen = torch.from_numpy(examples)
        return (self._lacking(logits.float(), chosen) * self.weights[chosen].to(logits.device)).sum()

    def lacking(self, logits: Float[np.ndarray, "example label"]) -> Int[np.ndarray, "lacking"]:
        """Return the examples to which the loss, and so its gradient, is due."""
        each = self._lacking(torch.from_numpy(logits), torch.arange(len(logits)))
        return np.flatnonzero(((each > 0) & (self.weights != 0)).numpy())

    def value(self, logits: Float[np.ndarray, "example label"]) -> float:
        """Return the loss of all examples; one with a logit that is not finite lacks infinitely much.

        With no target it is the opposite: what is no number is no right answer.
        """
        each = self._lacking(torch.from_numpy(logits), torch.arange(len(logits))).clamp_max(self.limit)
        each = torch.where(torch.from_numpy(np.isfinite(logits).all(axis=1)), each, torch.inf * self.signs)
        counts = self.weights != 0
        total = float((each[counts] * self.weights[counts]).double().sum())
        return float("inf") if np.isnan(total) else total  # both infinitely good and infinitely bad

    def part(self, examples: Int[np.ndarray, "some"], stand_for: Float[np.ndarray, "some"]) -> "Loss":
        """Return an estimate of the loss by some of the examples, each of which stands for so many."""
        chosen, times = torch.from_numpy(examples), torch.from_numpy(stand_for.astype(np.float32))
        return Loss(self.wanted[chosen], self.signs[chosen], self.weights[chosen] * times, self.margin, self.limit)

    def _lacking(self, logits: Float[Tensor, "chosen label"], chosen: Int[Tensor, "chosen"]) -> Float[Tensor, "chosen"]:
        wanted = self.wanted[chosen].to(logits.device)[:, None]
        ahead = logits.gather(1, wanted)[:, 0] - logits.scatter(1, wanted, -torch.inf).amax(dim=1)
        return torch.relu(self.margin - self.signs[chosen].to(logits.device) * ahead)
