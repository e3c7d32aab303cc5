"""A found attack: flips in their order, what they did, and how they are kept, applied and taken off."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors.numpy import load_file, save_file

from synapse.attack.bits.aim import Outcome
from synapse.errors import RunFolderError, SettingsError
from synapse.integrity import flaws, seal, write_whole
from synapse.model.classifier import Classifier, hash_tensors
from synapse.perturb.bits import BitFlips, Flip, named_weights


@dataclass(frozen=True)
class BitAttack:
    """Flips in the order in which they were found, with their outcomes after `after[i]` of them.

    `arm` is `attack` or `random`; the random one has no fitting examples. `source` and `target` are empty for "every
    class" and "no target". `model` is the SHA-256 of the attacked weights before, `flipped` that of the same weights
    with all flips applied.
    """

    perturbation: BitFlips
    source: str
    target: str
    arm: str
    after: tuple[int, ...]
    fitting: tuple[Outcome, ...]
    scoring: tuple[Outcome, ...]
    stopped: str
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
        weights = named_weights(classifier, self.perturbation.weights, self.perturbation.number_format)
        if hash_tensors(weights) != self.model:
            raise SettingsError(
                f"These flips were found for other weights than those of {classifier.name!r}; load the model they were "
                "found for, or apply `.perturbation`, which does not check."
            )
        with self.perturbation.applied(classifier):
            if hash_tensors(weights) != self.flipped:
                raise SettingsError("The flipped weights are not those that were attacked; search for the flips again.")
            yield

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
        words = {name: getattr(self, name) for name in ("source", "target", "arm", "stopped", "model", "flipped")}
        told = {**words, "number_format": self.perturbation.number_format, "weights": list(names)}
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
