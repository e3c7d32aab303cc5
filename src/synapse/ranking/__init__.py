"""Rankings of neurons, and the methods that make them. A new method is one class and one line in `METHODS`."""

from synapse.data.examples import Examples
from synapse.errors import SettingsError, near
from synapse.model.classifier import Classifier
from synapse.probe.probe import Probes
from synapse.ranking.base import Evidence, Ranking, RankingMethod, Scores
from synapse.ranking.effects import CausalEffect, ProbeRemoval
from synapse.ranking.gaussian import GaussianProbe
from synapse.ranking.gradients import (
    AttributionPatching,
    Conductance,
    GradientXActivation,
    IntegratedGradients,
    InternalInfluence,
    Taylor,
)
from synapse.ranking.information import (
    AveragePrecision,
    IntersectionOverUnion,
    MutualInformation,
    NeighbourInformation,
    RocAuc,
)
from synapse.ranking.selection import KSparse, L1Weight, RedundancyFiltered, SvmWeight
from synapse.ranking.statistics import (
    AnovaF,
    ClassSelectivity,
    CohenD,
    MeanDifference,
    MeanMagnitude,
    Probeless,
    RandomOrder,
    Variance,
)
from synapse.ranking.weights import CumulativeMass, HardThreshold, HeadWeight, LinearWeight
from synapse.types import Activations

METHODS: dict[str, RankingMethod] = {
    method.name: method
    for method in (
        # by the weights of a probe
        CumulativeMass(),
        LinearWeight(),
        LinearWeight("max"),
        HardThreshold(),
        ProbeRemoval(),
        # by statistics of the activations
        Probeless(),
        MeanDifference(),
        CohenD(),
        AnovaF(),
        ClassSelectivity(),
        ClassSelectivity(absolute=True),
        # by what a neuron alone tells of the class
        MutualInformation(),
        NeighbourInformation(),
        AveragePrecision(),
        RocAuc(),
        IntersectionOverUnion(),
        # by choosing neurons against each other
        L1Weight(),
        SvmWeight(),
        KSparse(),
        GaussianProbe(),
        RedundancyFiltered(),
        # by gradients of the model
        GradientXActivation(),
        Taylor(),
        AttributionPatching(),
        IntegratedGradients(),
        Conductance(),
        InternalInfluence(),
        # by what the model loses without the neuron
        CausalEffect("zero"),
        CausalEffect("mean"),
        CausalEffect("resample"),
        # what every other method is judged against
        RandomOrder(),
        Variance(),
        MeanMagnitude(),
        HeadWeight(),
    )
}
"""The ranking methods, by the names that tables, studies and `rank` know them by."""

__all__ = ["METHODS", "Evidence", "Ranking", "RankingMethod", "Scores", "rank"]


def rank(
    activations: Activations,
    *,
    method: str | RankingMethod = "cumulative-mass",
    probes: Probes | None = None,
    classifier: Classifier | None = None,
    examples: Examples | None = None,
) -> Ranking:
    """Return the ranking of the neurons of every layer, over all classes and for each of them.

    Most methods read the activations alone; some ask for `probes` on them, and some for the `classifier` and the
    `examples` that were recorded, on which they run the model.

    Raises:
        SettingsError: an unknown method, or one that was not given what it needs.
        DataError: an activation is not finite, or the examples are not those that were recorded.
    """
    if not isinstance(method, RankingMethod):
        if method not in METHODS:
            raise SettingsError(
                f"There is no ranking method {method!r}; the methods are {', '.join(METHODS)}.{near(method, METHODS)}"
            )
        method = METHODS[method]
    return method.rank(Evidence(activations, probes, classifier, examples))
