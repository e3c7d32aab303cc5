"""Found edits of the head as data: fitted for all pairs of classes, kept, applied, undone, and checked again later.

An edit adds a step to the target's row of the final linear map and, with two rows, takes it from the source's; one row
a pair is kept, not a matrix. What each does is stated as counts, so that whoever has the model and the examples can
check that it still does: see `HeadEdits.checked`.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Int
from safetensors.numpy import load_file, save_file
from torch import Tensor

from synapse.attack.base import attacked, needed_budget
from synapse.attack.bits.aim import Aim, Outcome
from synapse.attack.bits.checks import check_examples, differences, shortened, tolerance_of
from synapse.attack.certificate import least_for_share
from synapse.attack.head import Fits, HeadStep, Rows
from synapse.data.examples import Examples
from synapse.errors import RunFolderError, SettingsError, SplitError, near
from synapse.integrity import flaws, seal, write_whole
from synapse.model.classifier import Classifier, hash_tensors
from synapse.perturb.weights import HEAD, HeadEdit
from synapse.recording import record
from synapse.types import Activations

log = logging.getLogger(__name__)

BEYOND = 1e-4
"""Share by which an edit exceeds the budget at which its last example ties: rounding decides ties either way."""

_FILE = "edits.safetensors"
_ARRAYS = ("sources", "targets", "steps", "shares", "budgets")


@dataclass(frozen=True, eq=False)
class HeadEdits:
    """The edits of one head attack, for each pair of classes that it redirects, and what they did.

    `steps[p]` is added to the row of class `targets[p]` and, where `rows` is "two", taken from that of `sources[p]`;
    the budget `budgets[p]` is ||dW||_F / ||W||_F. With it a share `shares[p]` of the fitting examples is redirected,
    and `outcomes[p]` is what it did to the scoring ones. `model` is the SHA-256 of the final linear map before,
    `examples` the fingerprint of the scoring examples.
    """

    attack: str
    rows: Rows
    labels: tuple[str, ...]
    model: str
    examples: str
    sources: Int[np.ndarray, "pair"]
    targets: Int[np.ndarray, "pair"]
    steps: Float32[np.ndarray, "pair feature"]
    shares: Float[np.ndarray, "pair"]
    budgets: Float[np.ndarray, "pair"]
    outcomes: tuple[Outcome, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def edit(self, source: str, target: str) -> HeadEdit:
        """Return the edit that redirects one class to another, as a change of the final weights.

        Raises:
            SettingsError: an unknown class, or a pair that has no edit.
        """
        change = np.zeros((len(self.labels), self.steps.shape[1]), dtype=np.float32)
        for row, step in self._changed_rows(self._pair(source, target)).items():
            change[row] = step
        return HeadEdit(HEAD, change)

    @contextmanager
    def applied(self, classifier: Classifier, source: str, target: str) -> Iterator[None]:
        """Apply one edit while the context is open, to the final map that it was found for and to no other.

        Raises:
            SettingsError: the classifier's final map is another one; or as `edit`.
            RestoreError: the weights could not be put back bit for bit.
        """
        self._check_model(classifier)
        with self.edit(source, target).applied(classifier):
            yield

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each pair: classes, budget, and the shares of examples redirected and of others lost."""
        return pd.DataFrame(
            {
                "source": [self.labels[source] for source in self.sources],
                "target": [self.labels[target] for target in self.targets],
                "budget": self.budgets,
                "success": [outcome.success for outcome in self.outcomes],
                "collateral": [outcome.collateral for outcome in self.outcomes],
            }
        )

    def checked(self, classifier: Classifier, examples: Examples) -> list[str]:
        """Return what the edits do otherwise than stated, a sentence for each pair; nothing where all do what they did.

        The examples are run once, and every edit acts on what the final map reads. The first edit is applied to the
        live model too, and stands for the others: what it does there must be the same. Counts may differ by the
        examples that are too close to a tie to be predicted alike on every machine.

        Raises:
            SettingsError: the final map or the examples are others than those that the counts are of.
            LabelError, ModelError: as `synapse.recording.record`.
        """
        self._check_model(classifier)
        check_examples(examples, self.examples, "edits")
        scored = _Scored.of(classifier, record(classifier, examples, component="pooler"))
        tolerance, found = tolerance_of(classifier), []
        for pair, stated in enumerate(self.outcomes):
            aim, logits = self._done(pair, scored)
            found += differences(self._name(pair), stated, aim, tolerance, scored.logits, logits)
        aim, logits = self._done(0, scored)
        with self.applied(classifier, *self._ends(0)):
            live = classifier.predict(examples)
        name = f"{self._name(0)} in the live model"
        return found + differences(name, aim.outcome(logits), aim, tolerance, logits, live)

    def save(self, folder: Path | str) -> None:
        """Write the edits into a folder: `attack.json`, `edits.safetensors` and, last, their checksums."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        counts = np.array([astuple(outcome) for outcome in self.outcomes], dtype=np.int64)
        save_file({**arrays, "outcomes": counts}, folder / _FILE)
        told = {name: getattr(self, name) for name in ("attack", "rows", "labels", "model", "examples")}
        write_whole(folder / "attack.json", json.dumps(told, indent=1) + "\n")
        seal(folder)

    @classmethod
    def load(cls, folder: Path | str) -> "HeadEdits":
        """Return the edits that `save` wrote.

        Raises:
            RunFolderError: files are missing or have changed, or hold another kind of attack.
        """
        folder = Path(folder)
        if wrong := flaws(folder):
            raise RunFolderError(f"{folder} is no whole attack: {'; '.join(wrong)}. Save it again.")
        if not (folder / _FILE).is_file():
            raise RunFolderError(f"{folder} holds no edits of a head: a folder with {_FILE} was expected.")
        told = json.loads((folder / "attack.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / _FILE)
        outcomes = tuple(Outcome(*counts) for counts in arrays.pop("outcomes").tolist())
        return cls(labels=tuple(told.pop("labels")), outcomes=outcomes, **{**told, **arrays})

    def _pair(self, source: str, target: str) -> int:
        for name in (source, target):
            if name not in self.labels:
                raise SettingsError(
                    f"There is no class {name!r}; the classes are {', '.join(self.labels)}.{near(name, self.labels)}"
                )
        ends = self.labels.index(source), self.labels.index(target)
        pairs = np.flatnonzero((self.sources == ends[0]) & (self.targets == ends[1]))
        if len(pairs) == 0:
            raise SettingsError(f"There is no edit from {source!r} to {target!r}; `to_frame()` shows those that are.")
        return int(pairs[0])

    def _ends(self, pair: int) -> tuple[str, str]:
        return self.labels[self.sources[pair]], self.labels[self.targets[pair]]

    def _name(self, pair: int) -> str:
        return " -> ".join(self._ends(pair))

    def _changed_rows(self, pair: int) -> dict[int, Float32[np.ndarray, "feature"]]:
        """Return what is added to the rows of the final weights that change."""
        rows = {int(self.targets[pair]): self.steps[pair]}
        return rows if self.rows == "target" else {**rows, int(self.sources[pair]): -self.steps[pair]}

    def _done(self, pair: int, scored: "_Scored") -> tuple[Aim, Float[np.ndarray, "example label"]]:
        """Return whom an edit is about, and the logits under it."""
        ends = int(self.sources[pair]), int(self.targets[pair])
        return Aim.of(scored.targets, scored.logits, *ends), scored.logits_under(self._changed_rows(pair))

    def _outcome(self, pair: int, scored: "_Scored") -> Outcome:
        aim, logits = self._done(pair, scored)
        return aim.outcome(logits)

    def _check_model(self, classifier: Classifier) -> None:
        found = _hash_of(classifier)
        if found != self.model:
            raise SettingsError(
                f"These edits were found for a final map with the hash {shortened(self.model)}; that of "
                f"{classifier.name!r} is {shortened(found)}. Load the model that they were found for, or apply "
                "`edit(...)`, which does not check."
            )
        if classifier.labels != self.labels:
            raise SettingsError(
                f"These edits were found for the classes {', '.join(self.labels)}; those of {classifier.name!r} are "
                f"{', '.join(classifier.labels)}. Pass the former as `labels`."
            )


def fit_head_edits(
    step: HeadStep,
    train: Activations,
    test: Activations,
    classifier: Classifier,
    *,
    share: float = 0.95,
    max_fit: int = 400,
) -> HeadEdits:
    """Return the edits that redirect a share of the fitting examples, for all pairs of classes, scored on `test`.

    Pairs that one of the splits has no example of are left out, and so are those that no budget redirects. At most
    `max_fit` examples of a class choose the direction; all of them decide the budget. `test` is a whole recording, not
    a part of one: the counts are checked on the examples that it is of.

    Raises:
        SettingsError: the activations carry no features of the final linear map, or are of another model; `rows` is
            "all"; or no pair can be redirected.
        SplitError: the edits would be scored on the examples that they are fitted to.
    """
    if step.rows == "all":
        raise SettingsError("A step edits the row of the target, or two rows; all rows were asked for: use 'two'.")
    if train.source == test.source:
        raise SplitError("The edits would be scored on the examples that they are fitted to; give two splits.")
    labels, size = classifier.labels, float(classifier.head_weight().float().norm())
    fits, fitted, scored = Fits(train, test, (share,), max_fit), *(_Scored.of(classifier, a) for a in (train, test))
    pairs, steps, budgets = [], [], []
    for source, target in permutations(range(len(labels)), 2):
        for _, edit in fits.edits(step, source, target):  # one, or none
            examples = attacked(train, source, target)
            needed = needed_budget(fitted.logits[examples], fitted.features[examples] @ edit.T, target)
            norm = least_for_share(needed, share) * (1 + BEYOND)
            if not np.isfinite(norm):
                log.info(
                    "No edit along the fitted step redirects %g of %s to %s.", share, labels[source], labels[target]
                )
                continue
            pairs.append((source, target))
            steps.append((norm * edit[target]).astype(np.float32))
            budgets.append(norm / size)
    if not pairs:
        raise SettingsError(
            f"No pair of classes has examples of which {share:g} can be redirected; give more examples."
        )
    found = HeadEdits(
        attack=step.name,
        rows=step.rows,
        labels=labels,
        model=_hash_of(classifier),
        examples=test.source,
        sources=np.array([source for source, _ in pairs]),
        targets=np.array([target for _, target in pairs]),
        steps=np.stack(steps),
        shares=np.full(len(pairs), np.nan),
        budgets=np.array(budgets),
        outcomes=(),
    )
    own, other = (tuple(found._outcome(pair, split) for pair in range(len(pairs))) for split in (fitted, scored))
    return replace(found, shares=np.array([outcome.success for outcome in own]), outcomes=other)


@dataclass(frozen=True, eq=False)
class _Scored:
    """Examples as the final linear map sees them, and what its own rounding makes of changed rows."""

    weight: Float[Tensor, "label feature"]
    features: Float[np.ndarray, "example feature"]
    logits: Float[np.ndarray, "example label"]
    targets: Int[np.ndarray, "example"]

    @classmethod
    def of(cls, classifier: Classifier, recorded: Activations) -> "_Scored":
        """Return recorded examples, once the final map is proved to make their logits of their features."""
        weight, bias = classifier.head_weight().cpu(), getattr(classifier.final, "bias", None)
        if recorded.features is None:
            raise SettingsError("The activations hold no features of a final linear map; record them with logits.")
        features = np.asarray(recorded.features, dtype=np.float64)
        logits = recorded.known_logits.astype(np.float64)
        if (logits.shape[1], features.shape[1]) == tuple(weight.shape):
            made = features @ weight.double().numpy().T
            made += 0.0 if bias is None else bias.detach().double().cpu().numpy()
            if np.allclose(made, logits, atol=10 * tolerance_of(classifier) * (1 + np.abs(logits).max(initial=0))):
                return cls(weight, features, logits, recorded.targets)
        raise SettingsError("The recorded features do not give the recorded logits; record them with this classifier.")

    def logits_under(self, rows: Mapping[int, Float32[np.ndarray, "feature"]]) -> Float[np.ndarray, "example label"]:
        """Return the logits with steps added to rows of the weights, which round them to their own type."""
        logits = self.logits.copy()
        for row, step in rows.items():
            before = self.weight[row]
            change = (before + torch.from_numpy(step).to(before)).double() - before.double()
            logits[:, row] += self.features @ change.numpy()
        return logits


def _hash_of(classifier: Classifier) -> str:
    """Return the SHA-256 of the final linear map, with its bias where it has one."""
    classifier.head_weight()  # refuses a head that does not end in one
    assert classifier.final is not None
    return hash_tensors(classifier.final.state_dict())
