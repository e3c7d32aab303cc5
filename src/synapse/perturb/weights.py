"""Perturbations of weights that put every bit back, and prove it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from synapse.errors import RestoreError, SettingsError, near
from synapse.model.classifier import Classifier, hash_tensors

HEAD = "head"
"""The place of the final linear map; blocks are called `block 0`, `block 1`, ..."""

Pruned = Literal["smallest", "largest", "random"]
"""Which weights are set to zero: by their magnitude, or any."""
PRUNED: tuple[Pruned, ...] = get_args(Pruned)


def places(classifier: Classifier) -> tuple[str, ...]:
    """Return the names of the places whose weights can be perturbed: every block, and the head if it is linear.

    A block that is called several times is one place, named by its first call; one whose weights are quantised is none.
    """
    names = classifier.anatomy.blocks
    blocks = tuple(f"block {names.index(name)}" for name in dict.fromkeys(names) if _matrices(classifier, name))
    return blocks if classifier.final is None else (*blocks, HEAD)


def weights_at(classifier: Classifier, place: str) -> dict[str, Tensor]:
    """Return the weight matrices of a place by name; biases and norms, being vectors, are left out.

    Raises:
        SettingsError: an unknown place, or a head that does not end in a linear map.
    """
    if place not in places(classifier):
        raise SettingsError(f"There are no weights at {place!r}; the places are {', '.join(places(classifier))}.")
    if place == HEAD:
        weight = getattr(classifier.final, "weight", None)  # itself, since gradients are asked for by it
        assert isinstance(weight, Tensor)
        return {"weight": weight}
    return _matrices(classifier, classifier.anatomy.blocks[int(place.split()[1])])


def _matrices(classifier: Classifier, block: str) -> dict[str, Tensor]:
    weights = classifier.module.get_submodule(block).named_parameters()
    return {name: weight for name, weight in weights if weight.ndim >= 2 and weight.is_floating_point()}


@dataclass(frozen=True)
class WeightPerturbation(ABC):
    """A change of the weights at one place; `with classifier.edited(perturbation):` applies it.

    At the end the saved weights are copied back and compared by SHA-256 with what they were.
    """

    place: str

    @abstractmethod
    def changed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what replaces each weight matrix."""

    def weights(self, classifier: Classifier) -> Mapping[str, Tensor]:
        """Return the weights that may change, by name: by default the matrices of the place."""
        return weights_at(classifier, self.place)

    @contextmanager
    def applied(self, classifier: Classifier) -> Iterator[None]:
        """Change the weights while the context is open.

        Raises:
            RestoreError: the weights could not be put back bit for bit.
        """
        weights = self.weights(classifier)
        with put_back(weights, f"The weights at {self.place!r}", type(self).__name__) as saved:
            with torch.no_grad():
                for name, changed in self.changed(saved).items():
                    weights[name].copy_(changed)
            yield


@contextmanager
def put_back(weights: Mapping[str, Tensor], place: str, what: str) -> Iterator[dict[str, Tensor]]:
    """Give copies of weights, and put them back at the end; `place` and `what` changed them are named where that fails.

    Raises:
        RestoreError: the weights could not be put back bit for bit.
    """
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    before = hash_tensors(weights)
    try:
        yield saved
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])
        if hash_tensors(weights) != before:
            raise RestoreError(
                f"{place} are not what they were before {what}; load the model again, and do not trust what was "
                "measured after."
            )


@dataclass(frozen=True)
class WeightNoise(WeightPerturbation):
    """Adds Gaussian noise to each weight matrix, scaled to `budget` = ||dW||_F / ||W||_F exactly."""

    budget: float
    seed: int = 0

    def changed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the noisy matrices; the draw depends on the seed and the matrix's position in the place."""
        noisy = {}
        for position, (name, weight) in enumerate(weights.items()):
            draw = np.random.default_rng((self.seed, position)).standard_normal(weight.shape, dtype=np.float32)
            noisy[name] = _moved(weight, torch.from_numpy(draw).to(weight), self.budget)
        return noisy


@dataclass(frozen=True, eq=False)
class WeightStep(WeightPerturbation):
    """Moves each weight matrix along a direction of its own, by `budget` = ||dW||_F / ||W||_F exactly.

    A matrix without a direction, or with one of zeros, stays as it is.
    """

    budget: float
    directions: Mapping[str, Tensor]

    def changed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the moved matrices.

        Raises:
            SettingsError: a direction for a matrix that the place does not have.
        """
        for name in self.directions:
            if name not in weights:
                raise SettingsError(
                    f"There is no weight matrix {name!r} at {self.place!r}; there are {', '.join(weights)}."
                    f"{near(name, weights)}"
                )
        return {
            name: _moved(weights[name], direction.to(weights[name]), self.budget)
            for name, direction in self.directions.items()
        }


def _moved(weight: Tensor, direction: Tensor, budget: float) -> Tensor:
    length = direction.norm()
    moved: Tensor = weight + direction * (budget * weight.norm() / torch.where(length > 0, length, 1.0))
    return moved


@dataclass(frozen=True)
class Pruning(WeightPerturbation):
    """Sets a `share` of the weights of each matrix to zero: the smallest or the largest of it, or any at random.

    Random ones are nested: with the same seed a larger share takes in the weights of a smaller one. Source of pruning
    by magnitude: Han et al. (NeurIPS 2015), "Learning both weights and connections for efficient neural networks".
    """

    share: float
    which: Pruned = "smallest"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be, once and where it is given.

        Raises:
            SettingsError: a share that is none, or an unknown choice of weights.
        """
        if not 0 <= self.share <= 1:
            raise SettingsError(f"The share of weights is {self.share}; a number from 0 to 1 was expected.")
        if self.which not in PRUNED:
            raise SettingsError(
                f"The weights to prune are {self.which!r}; one of {', '.join(PRUNED)} was expected."
                f"{near(self.which, PRUNED)}"
            )

    def changed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the pruned matrices; so many weights of each are zero as the share of it is, to the nearest one."""
        pruned = {}
        for position, (name, weight) in enumerate(weights.items()):
            n = round(self.share * weight.numel())
            gone = self._order(weight, position).flatten().topk(n, largest=False, sorted=False).indices
            pruned[name] = weight.flatten().index_fill(0, gone, 0.0).reshape(weight.shape)
        return pruned

    def _order(self, weight: Tensor, position: int) -> Tensor:
        """Return numbers of which the smallest belong to the weights that go first."""
        if self.which == "random":
            draw = np.random.default_rng((self.seed, position)).random(weight.shape, dtype=np.float32)
            return torch.from_numpy(draw).to(weight.device)
        return weight.abs() if self.which == "smallest" else -weight.abs()


@dataclass(frozen=True, eq=False)
class HeadEdit(WeightPerturbation):
    """Adds a given change to the final weight matrix, and one to its bias where that is given too."""

    change: Float[np.ndarray, "label feature"]
    bias: Float[np.ndarray, "label"] | None = None

    def weights(self, classifier: Classifier) -> Mapping[str, Tensor]:
        """Return the final weight matrix, and the bias where it is edited.

        Raises:
            SettingsError: a change of another shape than what it is added to, or of a bias that the head does not have.
        """
        weights = weights_at(classifier, self.place)
        if self.bias is not None:
            weights["bias"] = _bias(classifier)
        for name, change in self._given.items():
            if change.shape != tuple(weights[name].shape):
                raise SettingsError(
                    f"The change of the head's {name} has the shape {change.shape}; {tuple(weights[name].shape)} was "
                    "expected: one row for each class."
                )
        return weights

    def changed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights with the changes added as they were given."""
        given = {name: torch.from_numpy(change).to(weights[name]) for name, change in self._given.items()}
        return {name: weights[name] + change for name, change in given.items()}

    @property
    def _given(self) -> dict[str, np.ndarray]:
        return {"weight": self.change} if self.bias is None else {"weight": self.change, "bias": self.bias}


def _bias(classifier: Classifier) -> Tensor:
    bias = getattr(classifier.final, "bias", None)
    if not isinstance(bias, Tensor):
        raise SettingsError("The final linear map has no bias to edit; leave `bias` out, or shift the logit instead.")
    return bias.detach()
