"""A classifier that travels: itself in the process where it is, loaded or copied anew in others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from synapse.errors import ModelError
from synapse.model.classifier import Classifier, choose_device
from synapse.model.pretrained import load_classifier


@dataclass(frozen=True, eq=False)
class Replica:
    """A recipe for a classifier that is at hand.

    In the process where it was made, `build()` returns that classifier. In another one it loads the same folder or hub
    id, where the classifier came from one, and takes over the anatomy that was proved; a classifier around a module of
    one's own is sent whole. A process uses a GPU if it sees one, and keeps the last classifier that it built.
    """

    classifier: Classifier

    def build(self) -> Classifier:
        """Return the classifier itself."""
        return self.classifier

    def __reduce__(self) -> tuple[Any, ...]:
        classifier, hashed = self.classifier, self.classifier.weights_hash()
        key = f"{hashed} {id(classifier)}"
        if classifier.loaded_from is None:
            return _Copy, (key, classifier)
        kept = {name: getattr(classifier, name) for name in ("labels", "anatomy", "name", "longest_sample", "notes")}
        max_tokens = {classifier.device.type: classifier.max_tokens}
        return _Reload, (key, classifier.loaded_from, kept, max_tokens, hashed)


@dataclass(frozen=True, eq=False)
class _Elsewhere:
    """A replica in another process; the key is that of the classifier it is made of."""

    key: str

    def build(self) -> Classifier:
        """Return the classifier, made when it was first asked for."""
        if self.key not in _built:
            _built.clear()  # room for the next
            _built[self.key] = self.made()
        return _built[self.key]

    def made(self) -> Classifier:
        raise NotImplementedError


_built: dict[str, Classifier] = {}
"""The replica of this process, by its key."""


@dataclass(frozen=True, eq=False)
class _Copy(_Elsewhere):
    classifier: Classifier

    def made(self) -> Classifier:
        return self.classifier


@dataclass(frozen=True, eq=False)
class _Reload(_Elsewhere):
    loaded_from: Mapping[str, Any]
    kept: Mapping[str, Any]
    max_tokens: Mapping[str, int]
    hashed: str

    def made(self) -> Classifier:
        loaded, device = load_classifier(**self.loaded_from), choose_device("auto")
        found = Classifier(loaded.module.to(device), loaded.preprocess, device=device, **self.kept)
        found.max_tokens = self.max_tokens.get(device.type, found.max_tokens)
        if found.weights_hash() != self.hashed:
            raise ModelError(
                f"The weights in {self.loaded_from['model']!r} are not those of the classifier that is studied, and "
                "workers load them from there; save them there, or wrap the module with `Classifier.from_module`, "
                "which sends it whole."
            )
        return found
