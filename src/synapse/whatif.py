"""What if these neurons were gone? One input, before and under interventions, beside random ones of the same size.

```python
neurons = ranking.top(50, layer=5, label="sqli")
result = what_if(classifier, "id=1' OR 1=1", [Zero(neurons)])
result.flipped, result.control_flips, result.moved
```

**Words.** The evidence of a word for a class is by how much the log-odds of the class, ln p / (1 - p), fall when the
word is left out of the text: erasure (Li, Monroe & Jurafsky, Understanding neural networks through representation
erasure, arXiv 1612.08220, 2016), on the scale of log-odds (Robnik-Sikonja & Kononenko, Explaining classifications for
individual instances, IEEE TKDE 20, 2008), which does not saturate where p is near 1 and does not move when all logits
do. The model is a black box here, so this works for every classifier of texts. It is computed for the class that is
predicted before, without and under the interventions, and the words are listed by how far the two lie apart.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import log_softmax, logsumexp

from synapse.data.inputs import KIND_WORDS, kind_of
from synapse.edits import Edit
from synapse.errors import SettingsError
from synapse.measure.intervals import rate
from synapse.model.classifier import Classifier
from synapse.perturb.activations import Intervention
from synapse.ranking.base import Ranking
from synapse.types import COMPONENTS, Activations, Component, Figure, Neurons

DRAWS = 20
"""Random sets that a result stands beside; fewer than `LEAST_DRAWS` would say nothing."""
LEAST_DRAWS = 10

MOST_WORDS = 100
"""Pieces that are left out one at a time; the words of longer texts are grouped with their neighbours."""

LONGEST_WORD = 30
"""Letters above which a piece is no word (a sequence, an encoded string) and is taken letter by letter."""

# A letter of a script without blanks between words; a run of letters and digits; or a run of signs.
_NO_BLANKS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_NO_BLANKS}]|[^\W{_NO_BLANKS}]+|[^\w\s]+")


@dataclass(frozen=True)
class Word:
    """A piece of the input: `text[start:end]` of its first (0) or second (1) text."""

    text: str
    part: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class WhatIf:
    """What a classifier says of one input, before and under interventions.

    `controls[d]` are the logits under the d-th random intervention of the same kinds and sizes; there is none where all
    units of a site are edited, since no other set has that size. `without_before[w]` and `without_after[w]` are the
    logits with word w left out, without and under the interventions. `notes` say what was left out, and why.
    """

    labels: tuple[str, ...]
    interventions: tuple[Intervention, ...]
    before: Float[np.ndarray, "label"]
    after: Float[np.ndarray, "label"]
    controls: Float[np.ndarray, "draw label"]
    words: tuple[Word, ...]
    without_before: Float[np.ndarray, "word label"]
    without_after: Float[np.ndarray, "word label"]
    notes: tuple[str, ...] = ()

    @property
    def prediction_before(self) -> str:
        """The class that is predicted without the interventions."""
        return self.labels[self._predicted]

    @property
    def prediction_after(self) -> str:
        """The class that is predicted under the interventions."""
        return self.labels[int(self.after.argmax())]

    @property
    def flipped(self) -> bool:
        """Whether the prediction is another one under the interventions."""
        return int(self.after.argmax()) != self._predicted

    @property
    def change(self) -> float:
        """By how much the log-odds of the class predicted before rise under the interventions."""
        return float(log_odds(self.after, self._predicted) - log_odds(self.before, self._predicted))

    @cached_property
    def control_changes(self) -> Float[np.ndarray, "draw"]:
        """The same under each random intervention."""
        return np.asarray(log_odds(self.controls, self._predicted) - log_odds(self.before, self._predicted))

    @property
    def control_flips(self) -> Figure:
        """The share of the random interventions that change the prediction, with its exact interval over draws."""
        flips = (self.controls.argmax(axis=1) != self._predicted).sum() if len(self.controls) else 0
        return rate(int(flips), len(self.controls), unit="random sets")

    @property
    def as_far(self) -> int:
        """How many of the random interventions move the log-odds at least as far, in either direction."""
        return int((np.abs(self.control_changes) >= abs(self.change)).sum())

    @cached_property
    def evidence_before(self) -> Float[np.ndarray, "word"]:
        """By how much the log-odds of the class predicted before fall when a word is left out."""
        return self._evidence(self.before, self.without_before)

    @cached_property
    def evidence_after(self) -> Float[np.ndarray, "word"]:
        """The same under the interventions, for the same class."""
        return self._evidence(self.after, self.without_after)

    @cached_property
    def moved(self) -> pd.DataFrame:
        """One row a word, with the evidence `before`, `after` and its `change`; what moved most comes first."""
        table = pd.DataFrame(
            {
                "word": [word.text for word in self.words],
                "place": np.arange(len(self.words)),
                "part": [word.part for word in self.words],
                "start": [word.start for word in self.words],
                "end": [word.end for word in self.words],
                "before": self.evidence_before,
                "after": self.evidence_after,
                "change": self.evidence_after - self.evidence_before,
                "probability_before": self._lost_probability(self.before, self.without_before),
                "probability_after": self._lost_probability(self.after, self.without_after),
            }
        )
        order = np.argsort(-table["change"].abs().to_numpy(), kind="stable")
        return table.iloc[order].reset_index(drop=True)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values: what `synapse whatif --json` writes."""
        return {
            "labels": list(self.labels),
            "interventions": [intervention.to_dict() for intervention in self.interventions],
            "before": self._said(self.before, self.prediction_before),
            "after": self._said(self.after, self.prediction_after),
            "flipped": self.flipped,
            "log_odds_change": self.change,
            "control": {
                "draws": len(self.controls),
                "flips": self.control_flips.to_dict(),
                "log_odds_changes": self.control_changes.tolist(),
                "as_far": self.as_far,
                "logits": self.controls.tolist(),
            },
            "words": {
                "class": self.prediction_before,
                "unit": f"log-odds of {self.prediction_before} lost without the word",
                "rows": [{str(name): value for name, value in row.items()} for row in self.moved.to_dict("records")],
            },
            "notes": list(self.notes),
        }

    @property
    def _predicted(self) -> int:
        return int(self.before.argmax())

    def _evidence(
        self, whole: Float[np.ndarray, "label"], without: Float[np.ndarray, "word label"]
    ) -> Float[np.ndarray, "word"]:
        return np.asarray(log_odds(whole, self._predicted) - log_odds(without, self._predicted))

    def _lost_probability(
        self, whole: Float[np.ndarray, "label"], without: Float[np.ndarray, "word label"]
    ) -> Float[np.ndarray, "word"]:
        return np.asarray(probabilities(whole)[self._predicted] - probabilities(without)[:, self._predicted])

    def _said(self, logits: Float[np.ndarray, "label"], prediction: str) -> dict[str, Any]:
        return {
            "prediction": prediction,
            "logits": dict(zip(self.labels, logits.tolist(), strict=True)),
            "probabilities": dict(zip(self.labels, probabilities(logits).tolist(), strict=True)),
        }


def log_odds(logits: Float[np.ndarray, "*run label"], label: int) -> Float[np.ndarray, "*run"]:
    """Return ln p / (1 - p) of one class, p being the softmax of the logits: its logit less those of all others.

    The others count as the logarithm of the sum of their exponentials; for two classes it is the difference of logits.
    """
    others = np.delete(np.asarray(logits, dtype=np.float64), label, axis=-1)
    return np.asarray(logits[..., label] - logsumexp(others, axis=-1), dtype=np.float64)


def probabilities(logits: Float[np.ndarray, "*run label"]) -> Float[np.ndarray, "*run label"]:
    """Return the softmax of the logits."""
    return np.asarray(np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=-1)))


def what_if(
    classifier: Classifier,
    item: Any,
    interventions: Sequence[Intervention],
    *,
    controls: Sequence[Sequence[Intervention]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    mask: str | None = None,
) -> WhatIf:
    """Return what the classifier says of one input before and under interventions, which act together.

    `item` is one raw input: a text or a pair of texts; of other kinds nothing is left out, since it is not clear what a
    part of them would be. `controls` are the random interventions, one list a draw; by default the same ones on random
    neurons (`random_sets`), with whatever numbers they carry. With `mask` a word is replaced by that text ("[MASK]")
    where it would be left out, which keeps the places of the others. What is random in an intervention is drawn as for
    the whole input when a word is left out, so that the two differ in the word alone.

    Raises:
        SettingsError: no intervention, fewer than 10 draws or controls, or one that the classifier cannot be given.
    """
    if not interventions:
        raise SettingsError("No intervention was given; one or more were expected, such as `Zero(neurons)`.")
    words, notes = _words(item)
    items = [item, *(_without(item, word, mask) for word in words)]
    key = next(iter(classifier.batches([item]))).keys[0]
    before = _logits(classifier, items, key)
    with classifier.edited(*interventions):
        after = _logits(classifier, items, key)
    if controls is None:
        sets = random_sets(classifier, [each.neurons for each in interventions], draws=draws, seed=seed)
        controls = [
            [replace(each, neurons=neurons) for each, neurons in zip(interventions, drawn, strict=True)]
            for drawn in sets
        ]
    elif 0 < len(controls) < LEAST_DRAWS:
        raise SettingsError(
            f"{len(controls)} random controls were given; {LEAST_DRAWS} or more say something about chance, none at "
            "all leave it open."
        )
    drawn_logits = np.empty((len(controls), len(classifier.labels)), dtype=np.float32)
    for draw, control in enumerate(controls):
        with classifier.edited(*control):
            drawn_logits[draw] = _logits(classifier, [item], key)[0]
    if not controls:
        notes = (*notes, "There is no random control: all units are edited, and no other set has that size.")
    return WhatIf(
        labels=classifier.labels,
        interventions=tuple(interventions),
        before=before[0],
        after=after[0],
        controls=drawn_logits,
        words=words,
        without_before=before[1:],
        without_after=after[1:],
        notes=notes,
    )


def random_sets(
    classifier: Classifier, neurons: Sequence[Neurons], *, draws: int = DRAWS, seed: int = 0
) -> list[tuple[Neurons, ...]]:
    """Return as many times as `draws` says random neurons for each of these sets, of its site and number.

    Equal sets get equal random ones. There are none where all sets are whole sites.

    Raises:
        SettingsError: fewer than 10 draws, or a negative seed.
    """
    if draws < LEAST_DRAWS:
        raise SettingsError(f"{draws} random draws were asked for; {LEAST_DRAWS} or more say something about chance.")
    if seed < 0:
        raise SettingsError(f"The seed is {seed}; 0 or more was expected.")
    widths = [classifier.sites(each.component)[each.layer].width for each in neurons]
    if all(len(each) == width for each, width in zip(neurons, widths, strict=True)):
        return []
    return [
        tuple(_random(each, width, (seed, draw)) for each, width in zip(neurons, widths, strict=True))
        for draw in range(draws)
    ]


def _random(neurons: Neurons, width: int, seed: tuple[int, int]) -> Neurons:
    place = (neurons.layer, COMPONENTS.index(neurons.component), *neurons.units)
    drawn = np.random.default_rng((*seed, *place)).permutation(width)[: len(neurons)]
    return replace(neurons, units=tuple(drawn.tolist()))


def _logits(classifier: Classifier, items: Sequence[Any], key: int) -> Float[np.ndarray, "item label"]:
    """Return the logits of the items as if all were one example, so that what is random is the same for all."""
    inputs = np.stack(items) if isinstance(items[0], np.ndarray) else items
    logits = np.empty((len(items), len(classifier.labels)), dtype=np.float32)
    for batch in classifier.batches(inputs):
        same = replace(batch, keys=(key,) * len(batch.keys))
        logits[batch.index] = classifier.forward(same).float().cpu().numpy()
    return logits


def _words(item: Any) -> tuple[tuple[Word, ...], tuple[str, ...]]:
    """Return the words of an input that are left out in turn, and notes on what is not."""
    kind = kind_of(item)
    if kind not in ("text", "pair"):
        return (), (f"Words are left out of texts and pairs of texts; of {KIND_WORDS[kind]} nothing is.",)
    texts = (item,) if kind == "text" else tuple(item)
    words = [word for part, text in enumerate(texts) for word in _split(text, part)]
    if len(words) < 2:
        return (), ("The text is a single word, so there is none to leave out.",)
    if len(words) <= MOST_WORDS:
        return tuple(words), ()
    grouped = [
        Word(texts[part][group[0].start : group[-1].end], part, group[0].start, group[-1].end)
        for part in range(len(texts))
        for group in _groups([word for word in words if word.part == part], MOST_WORDS // len(texts))
    ]
    return tuple(grouped), (
        f"The text has {len(words)} words; neighbours are left out together, in {len(grouped)} groups.",
    )


def _split(text: str, part: int) -> Iterable[Word]:
    for found in _WORD.finditer(text):
        start, end = found.span()
        if end - start <= LONGEST_WORD:
            yield Word(found.group(), part, start, end)
        else:
            for place in range(start, end):
                yield Word(text[place], part, place, place + 1)


def _groups(words: Sequence[Word], n_groups: int) -> list[list[Word]]:
    parts = np.array_split(np.arange(len(words)), min(n_groups, len(words))) if words else []
    return [[words[i] for i in part] for part in parts]


def _without(item: Any, word: Word, mask: str | None) -> Any:
    """Return the input without a word, or with the mask in its place."""
    text = item if isinstance(item, str) else item[word.part]
    before, after = text[: word.start], text[word.end :]
    if mask is None:
        # Of the two blanks around it one goes too; a blank that nothing follows would be a token for some tokenizers.
        if after[:1].isspace() and (not before or before[-1].isspace()):
            after = after[1:]
        shorter = before + after if after else before.rstrip()
    else:
        shorter = before + mask + after
    if isinstance(item, str):
        return shorter
    return tuple(shorter if part == word.part else item[part] for part in range(2))


def what_if_edits(
    classifier: Classifier,
    item: Any,
    edits: Sequence[Edit],
    *,
    rankings: dict[Component, Ranking],
    references: dict[Component, Activations],
    draws: int = DRAWS,
    seed: int = 0,
    mask: str | None = None,
) -> WhatIf:
    """Return what `what_if` does for edits in words; means and deviations of random neurons are their own.

    Raises:
        SettingsError: as `Edit.neurons`, `Edit.on` and `what_if`.
    """
    interventions = [
        edit.on(
            edit.neurons(classifier, rankings.get(edit.component), seed=seed),
            references.get(edit.component),
            seed=seed,
        )
        for edit in edits
    ]
    controls = [
        [
            edit.on(neurons, references.get(edit.component), seed=seed)
            for edit, neurons in zip(edits, drawn, strict=True)
        ]
        for drawn in random_sets(classifier, [each.neurons for each in interventions], draws=draws, seed=seed)
    ]
    return what_if(classifier, item, interventions, controls=controls, draws=draws, seed=seed, mask=mask)
