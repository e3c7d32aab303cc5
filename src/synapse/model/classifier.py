"""The classifier under study: a frozen Transformer with its preprocessing, its labels and its anatomy."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.data.batches import length_buckets
from synapse.data.examples import Examples
from synapse.errors import ModelError, SettingsError
from synapse.model.anatomy import Anatomy, find_anatomy, forward_logits, readout_rows
from synapse.model.pretrained import load_text_classifier

Inputs = Sequence[str] | np.ndarray
"""Raw inputs, one entry (or one row) an example."""

# Two texts of unequal length: the shorter one has padding rows when both stand in a batch.
SAMPLE_TEXTS = (
    "A short text.",
    "A second text, rather longer than the first, so that a batch of both is padded.",
)


STATE_NUMBERS = {"cpu": 400_000, "cuda": 25_000_000}
"""Numbers in one block output of a forward pass, at most."""

LogitEdit = Callable[[Tensor], Tensor]
"""Takes logits (example, label) and returns what replaces them."""


Preprocess = Callable[[Any], Mapping[str, Tensor]]
"""Turns raw inputs into the keyword arguments of the model's forward, example first in every tensor."""


@runtime_checkable
class Perturbation(Protocol):
    """Whatever can be applied to a classifier for a while and then comes off again."""

    def applied(self, classifier: "Classifier") -> AbstractContextManager[None]:
        """Return a context in which the classifier is perturbed."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples that share a forward pass.

    `index[i]` is the position of example i in the list that was batched; `keys[i]` identifies its content, so that
    anything random about it depends on the example and not on its neighbours.
    """

    index: Int[np.ndarray, "example"]
    keys: tuple[int, ...]
    inputs: Mapping[str, Tensor]

    def take(self, examples: Int[Tensor, "chosen"]) -> "Batch":
        """Return the chosen examples as a batch, padded as they were; an example may be chosen more than once."""
        chosen = examples.cpu().numpy()
        return Batch(
            self.index[chosen],
            tuple(self.keys[i] for i in chosen),
            {name: value[examples] for name, value in self.inputs.items()},
        )


class Classifier:
    """A frozen Transformer classifier that predicts, as it is or under perturbations.

    Make one with `from_pretrained` or `from_module`. The module is never trained or altered: what is applied to it
    comes off again at the end of a `with` block.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocess: Preprocess,
        labels: tuple[str, ...],
        anatomy: Anatomy,
        *,
        name: str,
        device: torch.device,
    ) -> None:
        self.module = module
        self.preprocess = preprocess
        self.labels = labels
        self.anatomy = anatomy
        self.name = name
        self.device = device
        self.blocks = tuple(module.get_submodule(block) for block in anatomy.blocks)
        # Rows of one forward pass: few enough to stay in a CPU's cache, many enough to keep a GPU busy.
        self.max_tokens = max(128, STATE_NUMBERS[device.type] // anatomy.width)
        self._batch: Batch | None = None
        self._logit_edits: list[LogitEdit] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        labels: Sequence[str] | None = None,
        device: str = "auto",
        max_length: int | None = None,
    ) -> "Classifier":
        """Return the sequence classifier in a local folder, or of a hub id when there is a network.

        `labels` overrides the names in the model's `id2label`, in the order of the logits. `max_length` cuts texts
        shorter than the model's own limit.

        Raises:
            ModelError: nothing to load there, or no fine-tuned single-label classification head.
            AnatomyError: the model's parts could not be found or proved.
        """
        loaded = load_text_classifier(model, max_length=max_length)
        return cls.from_module(
            loaded.module,
            preprocess=loaded.preprocess,
            labels=loaded.labels if labels is None else labels,
            sample=SAMPLE_TEXTS,
            name=Path(str(model)).name,
            device=device,
        )

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        preprocess: Preprocess,
        labels: Sequence[str],
        sample: Inputs,
        name: str = "",
        device: str = "auto",
    ) -> "Classifier":
        """Return a classifier around any `nn.Module` whose forward gives logits.

        `preprocess` turns raw inputs into forward arguments; if it has a method `lengths(inputs)`, examples of like
        length are batched together. `labels` are class names in the order of the logits. `sample` holds two or more
        raw inputs on which the anatomy is found and proved.

        Raises:
            SettingsError: fewer than two labels, labels that repeat or are empty, fewer than two samples.
            ModelError, AnatomyError: as `from_pretrained`.
        """
        labels = tuple(labels)
        if len(labels) < 2 or len(set(labels)) < len(labels) or "" in labels:
            raise SettingsError(
                f"The labels are {list(labels)}; two or more distinct, non-empty names in the order of the logits were "
                "expected. A regression head (one output) cannot be studied."
            )
        if len(sample) < 2:
            raise SettingsError(f"{len(sample)} sample inputs were given; two or more are needed to prove the anatomy.")
        if module.training:
            raise ModelError("The module is in training mode, so its answers are random; call `module.eval()` first.")
        place = choose_device(device)
        module.to(place)
        inputs = {key: value.to(place) for key, value in preprocess(sample).items()}
        with _plain_kernels():
            anatomy = find_anatomy(module, inputs, len(labels))
        return cls(module, preprocess, labels, anatomy, name=name or type(module).__name__, device=place)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Number of units of a block's output."""
        return self.anatomy.width

    @property
    def final(self) -> nn.Linear | None:
        """The linear map that gives the logits, if the head ends in one."""
        if self.anatomy.final is None:
            return None
        final = self.module.get_submodule(self.anatomy.final)
        assert isinstance(final, nn.Linear)
        return final

    def batches(self, inputs: Inputs) -> Iterator[Batch]:
        """Yield the inputs in batches of like length, each at most `max_tokens` rows."""
        lengths = getattr(self.preprocess, "lengths", None)
        if lengths is not None:
            buckets = length_buckets(lengths(inputs), batch_size=256, max_tokens=self.max_tokens)
        else:
            buckets = length_buckets(np.ones(len(inputs), dtype=np.int64), batch_size=32)
        for index in buckets:
            chosen = [inputs[i] for i in index] if not isinstance(inputs, np.ndarray) else inputs[index]
            tensors = {name: value.to(self.device) for name, value in self.preprocess(chosen).items()}
            yield Batch(index, tuple(_content_key(item) for item in chosen), tensors)

    def predict(self, examples: Examples | Inputs) -> Float[np.ndarray, "example label"]:
        """Return the logits of every example, in the order given, in float32."""
        inputs = examples.inputs if isinstance(examples, Examples) else examples
        logits = np.empty((len(inputs), len(self.labels)), dtype=np.float32)
        for batch in self.batches(inputs):
            logits[batch.index] = self.forward(batch).float().cpu().numpy()
        return logits

    def forward(self, batch: Batch) -> Float[Tensor, "example label"]:
        """Return the logits of one batch, under whatever perturbation is applied."""
        with self.running(batch), torch.inference_mode(), _plain_kernels():
            logits = forward_logits(self.module, batch.inputs)
            for edit in self._logit_edits:
                logits = edit(logits)
            return logits

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Make `batch` the current one, so that applied interventions know its readout rows."""
        previous, self._batch = self._batch, batch
        try:
            yield
        finally:
            self._batch = previous

    @contextmanager
    def logits_edited(self, edit: LogitEdit) -> Iterator[None]:
        """Pass the logits of every forward pass through `edit` while the context is open."""
        self._logit_edits.append(edit)
        try:
            yield
        finally:
            self._logit_edits.remove(edit)

    @property
    def current_batch(self) -> Batch:
        """The batch of the forward pass that is running."""
        if self._batch is None:
            raise SettingsError(
                "The module was called directly while an intervention was applied, so its examples are not known; "
                "call `classifier.predict(...)` instead."
            )
        return self._batch

    def readout_rows(self, batch: Batch, n_tokens: int) -> Int[Tensor, "example"]:
        """Return the index of the row that the head reads, for every example of the batch."""
        return readout_rows(self.anatomy.readout, batch.inputs, n_tokens)

    @contextmanager
    def edited(self, *perturbations: Perturbation) -> Iterator["Classifier"]:
        """Apply perturbations for the length of a `with` block; the model comes back at its end."""
        with ExitStack() as stack:
            for perturbation in perturbations:
                stack.enter_context(perturbation.applied(self))
            yield self

    def describe(self) -> dict[str, Any]:
        """Return the anatomy as plain values: what `synapse inspect --json` prints."""
        anatomy = self.anatomy
        return {
            "name": self.name,
            "n_blocks": self.n_layers,
            "width": self.width,
            "sites": [f"{block} (residual)" for block in anatomy.blocks],
            "readout": anatomy.readout,
            "head": list(anatomy.head),
            "final": anatomy.final,
            "embedding": anatomy.embedding,
            "labels": list(self.labels),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "proofs": dict(anatomy.proofs),
        }

    def weights_hash(self) -> str:
        """Return the SHA-256 of all parameters and buffers, names and bytes."""
        return hash_tensors(self.module.state_dict())


def choose_device(device: str) -> torch.device:
    """Return the device of that name; `auto` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"No device is called {device!r}; 'auto', 'cpu' or 'cuda' was expected.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"{device!r} was asked for, but no CUDA device is there; use 'cpu' or 'auto'.")
    return chosen


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of the tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _content_key(item: Any) -> int:
    content = item.encode() if isinstance(item, str) else np.ascontiguousarray(item).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Turn off PyTorch's fused encoder kernel, which skips hooks (pytorch/pytorch#128413), for the time being."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
