"""A found attack: flips in their order, what they did, and how they are kept, applied, checked and taken off."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors.numpy import load_file, save_file
from torch import Tensor

from synapse.attack.bits.aim import Outcome
from synapse.attack.bits.checks import check_examples, differences, tolerance_of
from synapse.attack.bits.runs import Aimed
from synapse.data.examples import Examples
from synapse.errors import RunFolderError, SettingsError
from synapse.integrity import flaws, seal, write_whole
from synapse.model.classifier import Classifier, hash_tensors
from synapse.perturb.bits import BitFlips, Flip, named_weights
from synapse.types import GLOBAL


@dataclass(frozen=True)
class BitAttack:
    """Flips in the order in which they were found, with their outcomes after `after[i]` of them.

    `arm` is `attack` or `random`; the random one has no fitting examples. `source` and `target` are empty for "every
    class" and "no target". `examples` is the fingerprint of the scoring examples, `model` the SHA-256 of the attacked
    weights before, and `flipped` that of the same weights with all flips applied.
    """

    perturbation: BitFlips
    source: str
    target: str
    arm: str
    after: tuple[int, ...]
    fitting: tuple[Outcome, ...]
    scoring: tuple[Outcome, ...]
    stopped: str
    examples: str
    model: str
    flipped: str

    @property
    def flips(self) -> tuple[Flip, ...]:
        """The flips; their number is the Hamming budget."""
        return self.perturbation.flips

    def flips_for(self, share: float, *, bound: float = 1.0) -> int | None:
        """Return the smallest number of flips after which this share of the scoring examples is redirected, if any.

        With a `bound`, no larger a share of the others may be lost then.
        """
        outcomes = zip(self.after, self.scoring, strict=True)
        enough = [n for n, now in outcomes if now.success >= share and not now.collateral > bound]
        return min(enough, default=None)

    @contextmanager
    def applied(self, classifier: Classifier) -> Iterator[None]:
        """Apply the flips while the context is open, to the weights that they were found for and to no others.

        Raises:
            SettingsError: the classifier's weights are not those, or they do not become what they became.
        """
        weights = self._weights(classifier)
        with self.perturbation.applied(classifier):
            if hash_tensors(weights) != self.flipped:
                raise SettingsError("The flipped weights are not those that were attacked; search for the flips again.")
            yield

    def checked(self, classifier: Classifier, examples: Examples) -> list[str]:
        """Return what the flips do otherwise than stated, in a sentence; nothing where they do what they did.

        Compared is what all of them together did to the scoring examples. Counts may differ by the examples that are
        too close to a tie to be predicted alike on every machine.

        Raises:
            SettingsError: the weights, the classes or the examples are others than those that the counts are of.
        """
        self._weights(classifier)
        source, target = (self._class(classifier, name) for name in (self.source, self.target))
        check_examples(examples, self.examples, "flips")
        with replace(self.perturbation, flips=()).applied(classifier), classifier.studied():
            scored = Aimed.of(classifier, examples, source, target)
            clean = scored.runs.logits()
        with self.applied(classifier), classifier.studied():
            flipped = scored.runs.logits()
        name = f"{self.source or 'every class'} -> {self.target or 'another class'}"
        return differences(name, self.scoring[-1], scored.aim, tolerance_of(classifier), clean, flipped)

    def _weights(self, classifier: Classifier) -> dict[str, Tensor]:
        """Return the weights that are attacked, once they are proved to be those that the flips were found for."""
        weights = named_weights(classifier, self.perturbation.weights, self.perturbation.number_format)
        if hash_tensors(weights) != self.model:
            raise SettingsError(
                f"These flips were found for other weights than those of {classifier.name!r}; load the model they were "
                "found for, or apply `.perturbation`, which does not check."
            )
        return weights

    def _class(self, classifier: Classifier, name: str) -> int | None:
        """Return the position of a class, None for every one."""
        if name not in (GLOBAL, *classifier.labels):
            raise SettingsError(
                f"The flips are about the class {name!r}; the classes of {classifier.name!r} are "
                f"{', '.join(classifier.labels)}. Pass the names that they were found with as `labels`."
            )
        return None if name == GLOBAL else classifier.labels.index(name)

    def save(self, folder: Path | str) -> None:
        """Write the attack into a folder: `attack.json`, `flips.safetensors` and, last, their checksums."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = self.perturbation.weights
        arrays = {
            "weight": np.array([names.index(flip.weight) for flip in self.flips], dtype=np.int64),
            "index": np.array([flip.index for flip in self.flips], dtype=np.int64),
            "bit": np.array([flip.bit for flip in self.flips], dtype=np.int64),
            "after": np.array(self.after, dtype=np.int64),
            **{name: _rows(getattr(self, name)) for name in ("fitting", "scoring")},
        }
        save_file(arrays, folder / "flips.safetensors")
        words = ("source", "target", "arm", "stopped", "examples", "model", "flipped")
        told = {name: getattr(self, name) for name in words}
        told |= {"number_format": self.perturbation.number_format, "weights": list(names)}
        write_whole(folder / "attack.json", json.dumps(told, indent=1) + "\n")
        seal(folder)

    @classmethod
    def load(cls, folder: Path | str) -> "BitAttack":
        """Return the attack that `save` wrote.

        Raises:
            RunFolderError: files are missing or have changed.
        """
        folder = Path(folder)
        if wrong := flaws(folder):
            raise RunFolderError(f"{folder} is no whole attack: {'; '.join(wrong)}. Save it again.")
        told = json.loads((folder / "attack.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / "flips.safetensors")
        names = tuple(told.pop("weights"))
        places = zip(arrays["weight"].tolist(), arrays["index"].tolist(), arrays["bit"].tolist(), strict=True)
        flips = tuple(Flip(names[weight], index, bit) for weight, index, bit in places)
        return cls(
            perturbation=BitFlips(told.pop("number_format"), names, flips),
            after=tuple(arrays["after"].tolist()),
            fitting=tuple(Outcome(*row) for row in arrays["fitting"].tolist()),
            scoring=tuple(Outcome(*row) for row in arrays["scoring"].tolist()),
            **told,
        )


def _rows(outcomes: Sequence[Outcome]) -> Int[np.ndarray, "outcome 5"]:
    return np.array([list(asdict(outcome).values()) for outcome in outcomes], dtype=np.int64).reshape(-1, 5)
