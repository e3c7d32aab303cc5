"""Sweeps: plans of interventions, and the logits under each of them."""

from synapse.sweeping.groups import TOLERANCE
from synapse.sweeping.items import AUTOCAST
from synapse.sweeping.kinds import KINDS, Kind
from synapse.sweeping.plan import FRACTIONS, Cell, Cost, Grid, Reach, cost_of, cumulative, plan
from synapse.sweeping.run import ENGINES, joined, sweep

__all__ = [
    "AUTOCAST",
    "ENGINES",
    "FRACTIONS",
    "KINDS",
    "TOLERANCE",
    "Cell",
    "Cost",
    "Grid",
    "Kind",
    "Reach",
    "cost_of",
    "cumulative",
    "joined",
    "plan",
    "sweep",
]
