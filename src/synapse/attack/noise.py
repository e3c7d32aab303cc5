"""How much Gaussian weight noise, at the head or in a block, changes predictions."""

import logging
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch

from synapse.data.examples import Examples
from synapse.model.classifier import Classifier
from synapse.model.resume import CleanPass, clean_pass, resume
from synapse.perturb.weights import HEAD, WeightNoise, places
from synapse.types import NoiseCurve, Progress, silent

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference from the whole model's logits, relative to their size, at which the resumed ones are trusted."""

BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Relative norms ||dW||/||W|| that are tried, of every weight matrix of the place at once."""


DRAWS = 8
"""Draws of the noise at each relative norm: they differ more from each other than examples do."""

BATCHES_AT_ONCE = 8
"""Batches whose clean block outputs are held at once: what bounds the memory."""


def noise_attack(
    classifier: Classifier,
    examples: Examples,
    *,
    seed: int,
    budgets: tuple[float, ...] = BUDGETS,
    draws: int = DRAWS,
    progress: Progress = silent,
) -> list[NoiseCurve]:
    """Return the logits of the examples under weight noise at every place, each run from the first changed block on.

    At each place the first batch is compared with the whole noisy model, and beyond `TOLERANCE` (relative to the
    logits) the place is run whole.
    """
    names = places(classifier)
    shape = (len(budgets), draws, len(examples), len(classifier.labels))
    logits = {place: np.empty(shape, dtype=np.float32) for place in names}
    done, total = 0, len(examples) * len(names)
    whole: dict[str, bool] = {}
    for group in _clean_groups(classifier, examples):
        for place in names:
            for (b, budget), draw in product(enumerate(budgets), range(draws)):
                with classifier.edited(WeightNoise(place, budget, seed=seed * 1009 + draw)):
                    if place not in whole:
                        whole[place] = not _agrees_with_whole(classifier, group[0], place)
                    for clean in group:
                        noisy = (
                            classifier.forward(clean.batch) if whole[place] else _from_place(classifier, clean, place)
                        )
                        logits[place][b, draw, clean.batch.index] = noisy.float().cpu().numpy()
            done += sum(len(clean.batch.index) for clean in group)
            progress(done, total)
    return [NoiseCurve(place, budgets, logits[place]) for place in names]


def _clean_groups(classifier: Classifier, examples: Examples) -> Iterator[list[CleanPass]]:
    """Yield the clean passes of several batches at a time, so that a change of weights serves more than one."""
    group: list[CleanPass] = []
    for batch in classifier.batches(examples.inputs):
        group.append(clean_pass(classifier, batch))
        if len(group) == BATCHES_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _agrees_with_whole(classifier: Classifier, clean: CleanPass, place: str) -> bool:
    whole = classifier.forward(clean.batch)
    gap = float((_from_place(classifier, clean, place) - whole).abs().max())
    agrees = gap <= TOLERANCE * (1 + float(whole.abs().max()))  # false for NaN, which agrees with nothing
    if not agrees:
        log.warning("Weight noise at %s: resumed logits are %.1e from the plain forward; it is run plain.", place, gap)
    return agrees


def noise_cost(classifier: Classifier, n_examples: int, *, budgets: int = len(BUDGETS), draws: int = DRAWS) -> int:
    """Return the block passes that `noise_attack` takes."""
    n_layers = classifier.n_layers
    blocks_above = sum(n_layers - 1 - _last_clean(classifier, place) for place in places(classifier))
    return n_examples * (n_layers + budgets * draws * blocks_above)


def _last_clean(classifier: Classifier, place: str) -> int:
    """Return the last block whose output the weights of the place leave as it was, or -1."""
    return classifier.n_layers - 1 if place == HEAD else int(place.split()[1]) - 1


def _from_place(classifier: Classifier, clean: CleanPass, place: str) -> torch.Tensor:
    """Return the logits of the batch, run from the place whose weights have changed."""
    layer = _last_clean(classifier, place)
    everyone = torch.arange(len(clean.logits), device=clean.logits.device)
    return resume(classifier, clean, layer, None if layer < 0 else clean.states[layer], everyone)
