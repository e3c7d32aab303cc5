"""Rankings of neurons, and the methods that make them. A new method is one file and one line in `METHODS`."""

from synapse.errors import SettingsError, near
from synapse.probe.probe import Probes
from synapse.ranking.base import Ranking, RankingMethod
from synapse.ranking.statistics import Probeless, RandomOrder
from synapse.ranking.weights import CumulativeMass, LinearWeight
from synapse.types import Activations

METHODS: dict[str, type[RankingMethod]] = {
    "cumulative-mass": CumulativeMass,
    "linear": LinearWeight,
    "probeless": Probeless,
    "random": RandomOrder,
}

__all__ = [
    "METHODS",
    "CumulativeMass",
    "LinearWeight",
    "Probeless",
    "RandomOrder",
    "Ranking",
    "RankingMethod",
    "rank",
]


def rank(activations: Activations, *, probes: Probes, method: str | RankingMethod = "cumulative-mass") -> Ranking:
    """Return the ranking of the neurons of every layer, over all classes and for each of them.

    Raises:
        SettingsError: an unknown method.
    """
    if isinstance(method, RankingMethod):
        return method.rank(activations, probes)
    if method not in METHODS:
        raise SettingsError(
            f"There is no ranking method {method!r}; the methods are {', '.join(METHODS)}.{near(method, METHODS)}"
        )
    return METHODS[method]().rank(activations, probes)
