"""How much Gaussian weight noise, at the head or in a block, changes predictions."""

from collections.abc import Sequence

from synapse.attack.trials import Strengths, WeightTrials, last_clean
from synapse.data.examples import Examples
from synapse.model.classifier import Classifier
from synapse.perturb.weights import WeightNoise, places
from synapse.types import Progress, StrengthCurve, silent

BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Relative norms ||dW||/||W|| that are tried, of every weight matrix of the place at once."""

DRAWS = 8
"""Draws of the noise at each relative norm: they differ more from each other than examples do."""

UNIT = "||dW||/||W||"


def noise_attack(
    classifier: Classifier,
    examples: Examples,
    *,
    seed: int,
    budgets: tuple[float, ...] = BUDGETS,
    draws: int = DRAWS,
    progress: Progress = silent,
) -> list[StrengthCurve]:
    """Return the logits of the examples under weight noise at every place, each run from the first changed block on."""
    trials, names, found = WeightTrials(classifier, examples), places(classifier), []
    for done, place in enumerate(names):
        found.append(trials.curve(weight_noise(place, budgets, draws=draws, seed=seed)))
        progress(done + 1, len(names))
    return found


def weight_noise(place: str, budgets: Sequence[float], *, draws: int, seed: int) -> Strengths:
    """Return draws of noise of these relative norms at a place."""
    seeds = range(seed * 1009, seed * 1009 + draws)
    changes = [[WeightNoise(place, budget, seed=one) for one in seeds] for budget in budgets]
    return Strengths("weight-noise", "random", UNIT, tuple(budgets), changes)


def noise_cost(classifier: Classifier, n_examples: int, *, budgets: int = len(BUDGETS), draws: int = DRAWS) -> int:
    """Return the block passes that `noise_attack` takes."""
    n_layers = classifier.n_layers
    blocks_above = sum(n_layers - 1 - last_clean(classifier, place) for place in places(classifier))
    return n_examples * (n_layers + budgets * draws * blocks_above)
