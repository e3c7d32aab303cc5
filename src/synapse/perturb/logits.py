"""Perturbations of the logits that the model returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from synapse.errors import SettingsError, near
from synapse.model.classifier import Classifier


@dataclass(frozen=True)
class LogitShift:
    """Adds `amount` to the logit of one class, which is the same as editing that class's bias.

    Source: the single-bias attack of Liu et al. (ICCAD 2017).
    """

    target: str
    amount: float

    @contextmanager
    def applied(self, classifier: Classifier) -> Iterator[None]:
        """Shift the logit in every forward pass of the classifier while the context is open."""
        if self.target not in classifier.labels:
            raise SettingsError(
                f"There is no class {self.target!r}; the classes are {', '.join(classifier.labels)}."
                f"{near(self.target, classifier.labels)}"
            )
        column = classifier.labels.index(self.target)

        def shift(logits: Tensor) -> Tensor:
            shifted = logits.clone()
            shifted[:, column] += self.amount
            return shifted

        with classifier.logits_edited(shift):
            yield
