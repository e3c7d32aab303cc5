"""How small a change of all weights of a place is enough where it follows the gradient of the loss.

The change is W + budget * ||W|| * d with ||d|| = 1 for each matrix. The first d is the gradient of the loss by the
matrix, made as long as 1; then the gradient is taken there, added to d, and the sum is made as long as 1 again: ascent
that is projected on the sphere. Every budget starts from the direction of the one before.

Source: Wu, Xia and Wang (NeurIPS 2020), "Adversarial weight perturbation helps robust generalization" (arXiv
2004.05884), equations 8 to 10, where it is a tool of training. The loss is that of examples that the change is not
scored on.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from synapse.attack.noise import UNIT
from synapse.attack.trials import Strengths, WeightTrials
from synapse.perturb.weights import WeightStep
from synapse.types import GLOBAL

BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Relative norms ||dW||/||W|| that are tried."""

STEPS = 2
"""Times the gradient is taken at each of them."""


def adversarial_steps(
    trials: WeightTrials, place: str, budgets: Sequence[float] = BUDGETS, *, target: str = GLOBAL, steps: int = STEPS
) -> list[WeightStep]:
    """Return the change of each size that raises the loss of the right classes, or lowers that of a target.

    `trials` are the examples that it is fitted on.
    """
    directions: Mapping[str, Tensor] = {}
    found = []
    for budget in sorted(budgets):
        for _ in range(steps):
            gradients = trials.gradients(WeightStep(place, budget, directions), target)
            directions = {
                name: _of_unit_length(directions.get(name, torch.zeros_like(gradient)) + _of_unit_length(gradient))
                for name, gradient in gradients.items()
            }
        found.append(WeightStep(place, budget, directions))
    return found


def adversarial_weights(steps: Sequence[WeightStep], target: str = GLOBAL) -> Strengths:
    """Return these changes as an attack to be scored."""
    budgets = tuple(step.budget for step in steps)
    return Strengths("adversarial-weights", "attack", UNIT, budgets, [[step] for step in steps], target)


def _of_unit_length(direction: Tensor) -> Tensor:
    """Return the direction; zeros where it is zero, or where the loss has left the numbers."""
    length = direction.norm()
    is_one = bool(torch.isfinite(length) & (length > 0))
    return direction / length if is_one else torch.zeros_like(direction)
