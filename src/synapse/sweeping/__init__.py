"""Sweeps: plans of interventions, and the logits under each of them."""

from synapse.sweeping.plan import FRACTIONS, KINDS, Cell, Cost, Grid, Kind, cost_of, plan
from synapse.sweeping.run import TOLERANCE, sweep

__all__ = ["FRACTIONS", "KINDS", "TOLERANCE", "Cell", "Cost", "Grid", "Kind", "cost_of", "plan", "sweep"]
