"""Edits of the head's weights that redirect a class, fitted on one split and scored on another.

The logits are z = W h + b. An edit dW moves them by dW h, so that along the ray s * dW the strength that each example
needs is a quotient: every curve is exact, and nothing is run. What is chosen is the direction.

| the edit | who chooses it |
|---|---|
| smallest for one example | `one_sample`, closed form |
| two rows, for a share of a class | a `HeadStep` of `steps`, with `redirect.redirect_head` |
| the same, of the top neurons of a ranking only | `redirect.ranked_head_attacks` |
| given keys get given values, the least damage elsewhere | `steps.minimal_damage_edit` |
| the bias alone | `redirect.bias_attacks` |
| rows exchanged, scaled, turned, emptied | `rows.row_attacks` |
"""

from synapse.attack.head.one_sample import one_sample_changes, one_sample_edits
from synapse.attack.head.redirect import SHARES, UNIT, Fits, bias_attacks, ranked_head_attacks, redirect_head
from synapse.attack.head.rows import EditBudget, edit_budget, row_attacks
from synapse.attack.head.shortest import fitted_step, least_distance, required_step, smallest_step
from synapse.attack.head.steps import (
    STEPS,
    FittedStep,
    HeadStep,
    KeptMeans,
    Keys,
    MeanStep,
    MinimalDamage,
    Rows,
    key_covariance,
    minimal_damage_edit,
)

__all__ = [
    "SHARES",
    "STEPS",
    "UNIT",
    "EditBudget",
    "Fits",
    "FittedStep",
    "HeadStep",
    "KeptMeans",
    "Keys",
    "MeanStep",
    "MinimalDamage",
    "Rows",
    "bias_attacks",
    "edit_budget",
    "fitted_step",
    "key_covariance",
    "least_distance",
    "minimal_damage_edit",
    "one_sample_changes",
    "one_sample_edits",
    "ranked_head_attacks",
    "redirect_head",
    "required_step",
    "row_attacks",
    "smallest_step",
]
