"""Ways to choose the step that is added to the target's row, and taken from the source's."""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from synapse.attack.head.shortest import fitted_step
from synapse.errors import SettingsError

Rows = Literal["target", "two", "all"]
"""Which rows of the head an edit may touch: the target's; that and the row of the class predicted now; all of them."""


@dataclass(frozen=True, eq=False)
class Keys:
    """What a step is chosen from: the features of the training examples, and what a redirection asks of the source's.

    `moment` is the mean of h h^T. `required[i]` is the least v . h that redirects example `of_source[i]`, and `share`
    the share of these that is to follow.
    """

    features: Float[np.ndarray, "example feature"]
    moment: Float[np.ndarray, "feature feature"]
    targets: Int[np.ndarray, "example"]
    of_source: Int[np.ndarray, "source"]
    required: Float[np.ndarray, "source"]
    share: float

    @cached_property
    def source(self) -> Float[np.ndarray, "source feature"]:
        """The source's features."""
        return np.asarray(self.features[self.of_source])

    def only(self, units: Int[np.ndarray, "unit"]) -> "Keys":
        """Return the same of some features."""
        return replace(self, features=self.features[:, units], moment=self.moment[np.ix_(units, units)])

    def mean_of(self, label: int) -> Float[np.ndarray, "feature"]:
        """Return the mean feature of a class."""
        mean: Float[np.ndarray, feature] = self.features[self.targets == label].mean(axis=0)
        return mean


@dataclass(frozen=True)
class HeadStep(ABC):
    """A way to choose v, which is added to the target's row and, with `rows="two"`, taken from the source's.

    With `units`, only these features' weights are edited.
    """

    _: KW_ONLY
    rows: Rows = "two"
    units: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The attack's name in tables."""

    @property
    def depends_on_share(self) -> bool:
        """Whether another share of examples asks for another direction."""
        return False

    @abstractmethod
    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return v, of any length, from keys that hold the allowed features alone."""

    def edit(self, keys: Keys, source: int, target: int, n_labels: int) -> Float[np.ndarray, "label feature"]:
        """Return the edit of Frobenius norm 1; 0 where the step is."""
        allowed = np.arange(keys.features.shape[1]) if self.units is None else np.array(self.units, dtype=np.int64)
        step = np.zeros(keys.features.shape[1])
        step[allowed] = self.step(keys if self.units is None else keys.only(allowed))
        edit = np.zeros((n_labels, len(step)))
        edit[target] = step
        if self.rows == "two":
            edit[source] = -step
        return edit / max(float(np.linalg.norm(edit)), np.finfo(float).tiny)


@dataclass(frozen=True)
class FittedStep(HeadStep):
    """The direction along which a share of other examples is reached early: see `fitted_step`."""

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-edit"

    @property
    def depends_on_share(self) -> bool:
        """Whether another share asks for another direction: it does."""
        return True

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return the fitted direction."""
        return fitted_step(keys.source, keys.required, share=keys.share)


@dataclass(frozen=True)
class MeanStep(HeadStep):
    """The source's mean feature: of all edits of that norm, the one that moves the mean example most."""

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-mean"

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return the mean feature."""
        return np.asarray(keys.source.mean(axis=0))


@dataclass(frozen=True)
class MinimalDamage(HeadStep):
    """C^-1 u, u the source's mean feature: of all edits that move it as far, that with the least E (v . h)^2.

    Source: see `minimal_damage_edit`; `ridge` as in `key_covariance`.
    """

    _: KW_ONLY
    ridge: float = 0.01

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-rank-one"

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return the direction for the key."""
        covariance = _with_ridge(keys.moment, self.ridge)
        step: Float[np.ndarray, feature] = np.linalg.solve(covariance, keys.source.mean(axis=0))
        return step


@dataclass(frozen=True)
class KeptMeans(MinimalDamage):
    """As `MinimalDamage`, with several keys: the mean features of all other classes keep their logits exactly."""

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-multi-key"

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return v with v . u = 1 for the source's mean and v . u_c = 0 for those of the others."""
        source = int(keys.targets[keys.of_source[0]])
        means = [keys.mean_of(int(label)) for label in np.unique(keys.targets) if label != source]
        u = np.stack([keys.source.mean(axis=0), *means], axis=1)
        values = np.eye(u.shape[1])[:1]
        covariance = _with_ridge(keys.moment, self.ridge)
        return np.asarray(minimal_damage_edit(np.zeros((1, len(u))), u, values, covariance)[0])


STEPS: tuple[HeadStep, ...] = (FittedStep(), MeanStep(), MinimalDamage(), KeptMeans())
"""The ways that are compared."""


def key_covariance(
    features: Float[np.ndarray, "example feature"], *, ridge: float = 0.01
) -> Float[np.ndarray, "feature feature"]:
    """Return C = E[h h^T] + lam * I, the second moment of the keys; lam is `ridge` times its mean diagonal entry."""
    return _with_ridge(second_moment(features), ridge)


def second_moment(features: Float[np.ndarray, "example feature"]) -> Float[np.ndarray, "feature feature"]:
    """Return the mean of h h^T."""
    h = features.astype(np.float64)
    moment: Float[np.ndarray, "feature feature"] = h.T @ h / max(len(h), 1)
    return moment


def _with_ridge(moment: Float[np.ndarray, "feature feature"], ridge: float) -> Float[np.ndarray, "feature feature"]:
    lam = ridge * max(float(np.trace(moment)) / len(moment), np.finfo(float).tiny)
    covariance: Float[np.ndarray, "feature feature"] = moment + lam * np.eye(len(moment))
    return covariance


def minimal_damage_edit(
    weight: Float[np.ndarray, "label feature"],
    keys: Float[np.ndarray, "feature key"],
    values: Float[np.ndarray, "label key"],
    covariance: Float[np.ndarray, "feature feature"],
) -> Float[np.ndarray, "label feature"]:
    """Return dW with (W + dW) U = V that minimises E ||dW h||^2 = tr(dW C dW^T).

    dW = (V - W U) (U^T C^-1 U)^-1 U^T C^-1; with one key u it is (v - W u) (C^-1 u)^T / (u^T C^-1 u), of rank one.
    Source: Meng et al. (NeurIPS 2022), "Locating and editing factual associations in GPT" (ROME), equation 2; several
    keys, exactly: the same Lagrangian with one multiplier a key.

    Raises:
        SettingsError: keys that are no independent directions, so that no edit gives all of them their values.
    """
    if np.linalg.matrix_rank(keys) < keys.shape[1]:
        raise SettingsError(
            f"The {keys.shape[1]} keys span {np.linalg.matrix_rank(keys)} directions; independent ones were expected. "
            "Leave out keys that follow from others, or allow more features."
        )
    whitened = np.linalg.solve(covariance, keys)  # C^-1 U
    edit: Float[np.ndarray, "label feature"] = (values - weight @ keys) @ np.linalg.solve(keys.T @ whitened, whitened.T)
    return edit
