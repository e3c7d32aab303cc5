"""What to protect, so that the cheapest attack on the final linear map costs ten times as much.

What is protected (by a checksum, by parity, by a second copy) cannot be changed unseen, so that an attacker has to do
with the rest. Protected are features (columns of the weights), rows, positions of stored bits, or single weights:

| protected | what an attacker pays | how it is known |
|---|---|---|
| features, rows | the norm of an edit that redirects 95 % of a class's right answers | proved: none does it for less |
| bit positions, weights | the bit flips that do so | found by a search: fewer may do |

Cost is that of the cheapest pair of classes. The bias is not among the weights: an attacker who can write it needs no
weight at all, so it has to be protected anyway.

Features are protected in an order, made on training examples: by their energy E[h_j^2], since an edit that may not
touch them has to reach the logits through ||h_free||, or by a ranking; and at random. Sets of rows need not all be
tried: freeing a row only makes an attack cheaper, so that what it costs with a single row free says whether any set
but that of all rows is enough.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from operator import attrgetter

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from synapse.attack.base import RANDOM_DRAWS, attacked
from synapse.attack.bits import REACHED, BitSearch
from synapse.attack.bits.aim import nearest_pairs
from synapse.attack.bits.candidates import random_flips
from synapse.attack.bits.found import BitAttack
from synapse.attack.certificate import least_change, quotient
from synapse.attack.families import HEAD_BITS
from synapse.attack.head import UNIT
from synapse.errors import SettingsError
from synapse.model.classifier import Classifier
from synapse.perturb.bits import FORMATS, Flip, Format, StoredWeight, bit_positions, named_weights
from synapse.perturb.weights import HEAD
from synapse.types import GLOBAL, Activations, Progress, silent

log = logging.getLogger(__name__)

FACTOR = 10.0
"""How many times as much the cheapest attack is to cost."""

SHARE = 0.95
"""Share of a source's right answers that an attack redirects."""

SIZES = (0.5, 0.9)
"""Shares of the features that are protected besides, to see how the cost grows."""

SEARCH = replace(HEAD_BITS, each_bit=4)
"""The search of the family `bits`, with half as many candidates: it is made dozens of times."""

PAIRS = 3
"""Pairs of classes that flips are searched for: those whose logits are nearest in training."""

WEIGHTS = 16
"""Weights that are protected, at least: those that a search used, and then those of the search that does without."""

RANDOM, RANDOM_ORDER = "random", "random order"
"""How the controls are chosen: as many at random, or as many in a random order as it takes."""


@dataclass(frozen=True)
class Defence:
    """What the cheapest attack costs where a part of the final linear map is protected."""

    what: str
    """`features`, `rows`, `bits` (positions, in every weight) or `weights`."""
    location: str
    """`head`, or with the number format in which its bits are flipped."""
    chosen: str
    """How the protected ones were chosen; `random` and `random order` are the controls."""
    draw: int
    """Number of the random draw; -1 where nothing was drawn."""
    protected: int
    """How many are protected."""
    of: int
    """How many there are."""
    before: float
    """What the cheapest attack costs where nothing is protected."""
    after: float
    """What it costs then; infinite where there is none, or none was found."""
    unit: str
    searched: float
    """The largest cost at which attacks were searched for; infinite for what is proved."""
    source: str
    """The pair of classes that is cheapest then; empty where there is none."""
    target: str

    @property
    def factor(self) -> float:
        """How many times as much the cheapest attack costs; infinite where there is none, or none was found."""
        return self.after / self.before if self.before else float("nan")


def defend_head(
    classifier: Classifier,
    train: Activations,
    test: Activations,
    order: Int[np.ndarray, "feature"] | None = None,
    progress: Progress = silent,
    *,
    formats: Sequence[Format] = FORMATS,
    seed: int = 0,
) -> list[Defence]:
    """Return what protects the final linear map, and how well; nothing where there is no such map to protect.

    Both splits are recordings with features. `order` is that of the features by a ranking, most important first.
    Without `formats` no bits are flipped, and the rest takes a moment.
    """
    if classifier.final is None or test.features is None or train.features is None:
        log.warning("The head does not end in a linear map, so there is nothing of it to protect.")
        return []
    weight = classifier.head_weight().float().cpu().numpy()
    found = [*protected_features(train, test, weight, order, seed=seed), *protected_rows(test, weight, seed=seed)]
    progress(1, 1 + len(formats))
    for done, number_format in enumerate(formats):
        search = replace(SEARCH, number_format=number_format)
        found += protected_bits(search, classifier, train, test, seed=seed)
        progress(2 + done, 1 + len(formats))
    return found


def defence_table(defences: Sequence[Defence]) -> pd.DataFrame:
    """Return a row for each defence: its fields, and `factor`; `searched` is infinite for what is proved."""
    return pd.DataFrame([asdict(defence) | {"factor": defence.factor} for defence in defences])


# ------------------------------------------------------------------------------------------------ what is proved: edits


@dataclass(frozen=True, eq=False)
class _Right:
    """The right answers of one class, and the length of the logit change that redirects each to every other class.

    It is infinite towards the class itself.
    """

    source: int
    examples: Int[np.ndarray, "example"]
    changes: Float[np.ndarray, "example target"]


Ends = tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Edits:
    """What edits of the final weights cost, at least, on one set of examples."""

    test: Activations
    weight: Float[np.ndarray, "label feature"]

    @cached_property
    def squares(self) -> Float[np.ndarray, "example feature"]:
        """The squares of the features."""
        return np.square(np.asarray(self.test.features, dtype=np.float64))

    @cached_property
    def of_all_rows(self) -> list[_Right]:
        """The changes of the logits where every row may be edited."""
        return list(self.changes(range(len(self.test.labels))))

    def changes(self, rows: Sequence[int]) -> Iterator[_Right]:
        """Yield the changes of the logits where only these rows may be edited, class by class."""
        n_labels = len(self.test.labels)
        for source in range(n_labels):
            examples = attacked(self.test, source, source)
            if len(examples) == 0:
                continue
            changes = np.full((len(examples), n_labels), np.inf)
            for target in range(n_labels):
                # With neither row free, the target cannot get ahead of its source.
                if target != source and (source in rows or target in rows):
                    changes[:, target] = least_change(self.test.known_logits[examples], target, rows=rows)
            yield _Right(source, examples, changes)

    def cheapest(
        self, rows: Sequence[int] | None = None, features: Int[np.ndarray, "free"] | None = None
    ) -> tuple[float, Ends | None]:
        """Return the relative norm that an edit of these rows and features needs at least, and for which pair.

        It is that of the pair of classes that needs least; infinite, and no pair, where no edit does it.
        """
        squares = self.squares if features is None else self.squares[:, features]
        length = np.sqrt(squares.sum(axis=1))
        best: tuple[float, Ends | None] = np.inf, None
        for right in self.of_all_rows if rows is None else self.changes(rows):
            needed = quotient(right.changes, length[right.examples][:, None])
            last = int(np.ceil(SHARE * len(needed))) - 1
            norms = np.partition(needed, last, axis=0)[last] / float(np.linalg.norm(self.weight))
            target = int(norms.argmin())
            if norms[target] < best[0]:
                best = float(norms[target]), (right.source, target)
        return best

    def defence(
        self, what: str, chosen: str, draw: int, protected: int, of: int, found: tuple[float, Ends | None]
    ) -> Defence:
        """Return what was found, beside what an attack needs where nothing is protected."""
        after, ends = found
        names = [GLOBAL, GLOBAL] if ends is None else [self.test.labels[end] for end in ends]
        return Defence(what, HEAD, chosen, draw, protected, of, self.before, after, UNIT, np.inf, *names)

    @cached_property
    def before(self) -> float:
        """What the cheapest pair needs where nothing is protected."""
        return self.cheapest()[0]


@dataclass(frozen=True, eq=False)
class _InOrder:
    """Features that are protected in an order."""

    edits: _Edits
    order: Int[np.ndarray, "feature"]
    chosen: str
    draw: int = -1

    def first(self, k: int) -> Defence:
        """Return the protection of the first k features."""
        cheapest = self.edits.cheapest(features=self.order[k:])
        return self.edits.defence("features", self.chosen, self.draw, k, len(self.order), cheapest)

    def enough(self) -> Defence:
        """Return the protection of as few features as are enough."""
        # The more are protected, the more is needed.
        return self.first(bisect_left(range(len(self.order)), FACTOR, key=lambda k: self.first(k).factor))


def protected_features(
    train: Activations,
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    order: Int[np.ndarray, "feature"] | None = None,
    *,
    seed: int,
) -> list[Defence]:
    """Return what protecting shares of the features does, and how many it takes until every edit needs ten times as
    much, in several orders.

    The orders are that of the energy in `train`, that of `order`, and random ones; the norms are those of `test`.
    Nothing where no class is ever right.

    Raises:
        SettingsError: the activations carry no features of the final linear map.
    """
    edits = _edits(test, weight)
    if train.features is None:
        raise SettingsError("The activations carry no features of the final linear map; record them with logits.")
    if not np.isfinite(edits.before):
        return []
    energy = np.square(np.asarray(train.features, dtype=np.float64)).mean(axis=0)
    orders = [_InOrder(edits, np.argsort(-energy, kind="stable"), "energy")]
    if order is not None:
        orders.append(_InOrder(edits, order, "ranking"))
    drawn = [np.random.default_rng((seed, draw)).permutation(len(energy)) for draw in range(RANDOM_DRAWS)]
    random = [_InOrder(edits, one, RANDOM, draw) for draw, one in enumerate(drawn)]
    sizes = [round(share * len(energy)) for share in SIZES]
    return [
        *(defence for one in orders for defence in (*map(one.first, sizes), one.enough())),
        *(defence for one in random for defence in map(one.first, sizes)),
        *(replace(one, chosen=RANDOM_ORDER).enough() for one in random),
    ]


def protected_rows(test: Activations, weight: Float[np.ndarray, "label feature"], *, seed: int) -> list[Defence]:
    """Return what an edit needs where all rows are protected, all but one, and so on, while it is ten times the norm.

    The row that is left free next is the one that leaves the attack dearest, and the last of these protections is not
    enough any more. If that is the one of all rows but one, no smaller set is enough either: freeing rows only makes an
    attack cheaper. Its controls leave as many rows free at random, or each one in turn. Nothing where no class is
    ever right.

    Raises:
        SettingsError: the activations carry no features of the final linear map.
    """
    edits, n = _edits(test, weight), len(weight)
    if not np.isfinite(edits.before):
        return []
    free: list[int] = []
    found = [edits.defence("rows", "dearest", -1, n, n, (np.inf, None))]
    while found[-1].factor >= FACTOR and len(free) < n:
        costs = {row: edits.cheapest(rows=[*free, row]) for row in range(n) if row not in free}
        best = max(costs, key=lambda row: costs[row][0])
        free.append(best)
        found.append(edits.defence("rows", "dearest", -1, n - len(free), n, costs[best]))
    rng = np.random.default_rng(seed)
    if len(free) == 1:
        drawn = rng.permutation(n)[:RANDOM_DRAWS, None]
    else:
        drawn = np.stack([rng.permutation(n)[: len(free)] for _ in range(RANDOM_DRAWS)])
    for draw, rows in enumerate(drawn.tolist()):
        found.append(edits.defence("rows", RANDOM, draw, n - len(free), n, edits.cheapest(rows=rows)))
    return found


def _edits(test: Activations, weight: Float[np.ndarray, "label feature"]) -> _Edits:
    if test.features is None:
        raise SettingsError("The activations carry no features of the final linear map; record them with logits.")
    return _Edits(test, weight)


# ------------------------------------------------------------------------------------------------- what is found: flips


@dataclass(frozen=True, eq=False)
class _Flips:
    """The cheapest flips that searches find in the final weights, over some pairs of classes."""

    classifier: Classifier
    train: Activations
    test: Activations
    pairs: Sequence[Ends]

    def cheapest(self, search: BitSearch) -> tuple[float, BitAttack | None]:
        """Return the fewest flips that a search finds, and the attack that has them; infinite where none is found.

        What other classes lose does not matter here. A pair is given up once it has as many flips as another needs.
        """
        fewest, best = np.inf, None
        for source, target in self.pairs:
            most = int(min(search.most, fewest - 1))
            if most < 1:
                break
            ends = self.test.labels[source], self.test.labels[target]
            attack = self._found(replace(search, most=most, stealth=0.0, bound=1.0), *ends)
            needed = attack.flips_for(SHARE)
            if needed is not None and needed < fewest:
                fewest, best = float(needed), attack
        return fewest, best

    def _found(self, search: BitSearch, source: str, target: str) -> BitAttack:
        """Return what a search finds; one that is done with enough of the fitting examples alone goes on to all."""
        attack = search.find(self.classifier, self.train, self.test, source=source, target=target)
        if attack.stopped == REACHED and attack.flips_for(SHARE) is None and search.share < 1:
            return self._found(replace(search, share=1.0), source, target)
        return attack


def protected_bits(
    search: BitSearch,
    classifier: Classifier,
    train: Activations,
    test: Activations,
    *,
    pairs: int | None = PAIRS,
    draws: int = RANDOM_DRAWS,
    seed: int,
) -> list[Defence]:
    """Return how many flips the search needs beside protected bit positions, and beside protected weights.

    Positions are protected in every weight, the highest first, one more each time until the search needs ten times the
    flips, or finds none. Weights are protected as a whole: those that the search uses, and those that it then uses
    instead, until there are `WEIGHTS` of them. Both stand beside as many bits, and as many weights, at random, in so
    many `draws`.

    Flips are searched for in the `pairs` of classes that are nearest in training (None: in all). Nothing where
    they are not found without a protection. What a search needs is no bound: another may need less. Flips that are
    found beside a protection do the same without it, and beside a smaller one, so they count there too.

    Raises:
        SettingsError: the activations carry no features of the final linear map, or are of another model.
    """
    nearest = [(source, to) for source, to in nearest_pairs(train) if len(attacked(test, source, to))]
    flips = _Flips(classifier, train, test, nearest[:pairs])
    before, attack = flips.cheapest(search)
    if attack is None:
        log.info("No flips in %s redirect a class, so there is nothing to protect from.", search.number_format)
        return []
    protections = _Protections(flips, search, before, attack, draws, seed)
    found = [*protections.of_positions(), *protections.of_weights()]
    fewest = min([before, *(one.after for one in found)])
    return [replace(one, before=fewest) for one in found]


@dataclass(frozen=True, eq=False)
class _Protections:
    """Protections from one search, which needs `before` flips without: those of `attack`."""

    flips: _Flips
    search: BitSearch
    before: float
    attack: BitAttack
    draws: int
    seed: int

    @cached_property
    def stored(self) -> dict[str, StoredWeight]:
        """The weights that are attacked, as they are stored."""
        plain = replace(self.attack.perturbation, flips=())
        return plain.stored(named_weights(self.flips.classifier, plain.weights, plain.number_format))

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return sum(stored.words.numel() for stored in self.stored.values())

    @property
    def bits(self) -> tuple[int, ...]:
        """The positions of the bits of a word, the lowest first."""
        return bit_positions(self.search.number_format)

    def of_positions(self) -> Iterator[Defence]:
        """Yield the protections of ever more positions, and of as many bits at random as the last."""
        n, found = len(self.bits), list[Defence]()
        for protected in range(1, n):
            search = replace(self.search, bits=self.bits[:-protected])
            found.append(self._defence("bits", "highest", -1, protected, n, search)[0])
            if found[-1].factor >= FACTOR:
                break
        for number, one in enumerate(found):
            best = min(found[number:], key=attrgetter("after"))
            yield replace(one, after=best.after, source=best.source, target=best.target)
        for draw in range(self.draws):
            drawn = random_flips(
                self.stored, self.bits, protected * self.n_weights, finite=False, seed=self._seed(draw)
            )
            search = replace(self.search, protected=frozenset(drawn))
            yield self._defence("bits", RANDOM, draw, protected, n, search)[0]

    def of_weights(self) -> Iterator[Defence]:
        """Yield the protection of the weights that searches used, and of as many at random."""
        attack: BitAttack | None = self.attack
        used: set[tuple[str, int]] = set()
        every = [(name, index) for name, stored in self.stored.items() for index in range(stored.words.numel())]
        while attack is not None and len(used) < WEIGHTS:
            used |= {(flip.weight, flip.index) for flip in attack.flips}
            found, attack = self._without("used first", -1, sorted(used))
        yield found
        for draw in range(self.draws):
            drawn = np.random.default_rng(self._seed(draw)).permutation(len(every))[: len(used)]
            yield self._without(RANDOM, draw, [every[i] for i in drawn])[0]

    def _without(self, chosen: str, draw: int, weights: Sequence[tuple[str, int]]) -> tuple[Defence, BitAttack | None]:
        protected = frozenset(Flip(name, index, bit) for (name, index), bit in product(weights, self.bits))
        search = replace(self.search, protected=protected)
        return self._defence("weights", chosen, draw, len(weights), self.n_weights, search)

    def _defence(
        self, what: str, chosen: str, draw: int, protected: int, of: int, search: BitSearch
    ) -> tuple[Defence, BitAttack | None]:
        after, attack = self.flips.cheapest(search)
        location, most = f"{HEAD}, {search.number_format}", float(search.most)
        ends = (GLOBAL, GLOBAL) if attack is None else (attack.source, attack.target)
        found = Defence(what, location, chosen, draw, protected, of, self.before, after, "bits", most, *ends)
        return found, attack

    def _seed(self, draw: int) -> int:
        return self.seed * 1009 + draw
