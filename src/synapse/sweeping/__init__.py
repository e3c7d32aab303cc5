"""Sweeps: plans of interventions, and the logits under each of them."""

from synapse.sweeping.plan import FRACTIONS, KINDS, Cell, Cost, Grid, Kind, Reach, cost_of, plan
from synapse.sweeping.run import TOLERANCE, joined, sweep

__all__ = [
    "FRACTIONS",
    "KINDS",
    "TOLERANCE",
    "Cell",
    "Cost",
    "Grid",
    "Kind",
    "Reach",
    "cost_of",
    "joined",
    "plan",
    "sweep",
]
