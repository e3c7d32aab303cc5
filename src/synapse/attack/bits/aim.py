"""Whom an attack is about, what it is to lower, and what came of it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


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

    def loss(self, stealth: float) -> "Loss":
        """Return what flips are to lower.

        The mean cross-entropy of the attacked examples towards the target (less that of their own classes where there
        is none), plus `stealth` times that of the others' own classes.
        """
        wanted = self.targets if self.target is None else np.where(self.attacked, self.target, self.targets)
        sign = -1.0 if self.target is None else 1.0
        weights = sign * self.attacked / max(1, self.attacked.sum()) + stealth * self.others / max(1, self.others.sum())
        return Loss(torch.from_numpy(wanted), torch.from_numpy(weights.astype(np.float32)))


def predictions(logits: Float[np.ndarray, "example label"]) -> Int[np.ndarray, "example"]:
    """Return the predicted classes; -1 where a logit is NaN or infinite."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


@dataclass(frozen=True, eq=False)
class Loss:
    """A weighted sum of the examples' cross-entropies towards wanted classes."""

    wanted: Int[Tensor, "example"]
    weights: Float[Tensor, "example"]

    def of(self, logits: Float[Tensor, "chosen label"], examples: Int[np.ndarray, "chosen"]) -> Float[Tensor, ""]:
        """Return the part of the loss that is due to some examples."""
        chosen = torch.from_numpy(examples)
        each = cross_entropy(logits.float(), self.wanted[chosen].to(logits.device), reduction="none")
        return (each * self.weights[chosen].to(logits.device)).sum()

    def value(self, logits: Float[np.ndarray, "example label"]) -> float:
        """Return the loss of all examples; a logit that is not finite makes its example's cross-entropy infinite."""
        each = cross_entropy(torch.from_numpy(logits), self.wanted, reduction="none")
        each = torch.where(torch.from_numpy(np.isfinite(logits).all(axis=1)), each, torch.inf)
        counts = self.weights != 0
        total = float((each[counts] * self.weights[counts]).double().sum())
        return float("inf") if np.isnan(total) else total  # both infinitely good and infinitely bad
