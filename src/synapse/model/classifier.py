"""The classifier under study: a frozen Transformer with its preprocessing, its labels and its anatomy."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synapse.data.batches import equal_lengths, length_buckets
from synapse.data.examples import Examples
from synapse.data.inputs import content_bytes
from synapse.errors import LabelError, ModelError, ResourceError, SettingsError, near
from synapse.model.anatomy import Anatomy, Overrides
from synapse.model.discovery import find_anatomy
from synapse.model.hooks import Site, study_mode
from synapse.model.preprocess import preprocess_for
from synapse.model.pretrained import load_classifier
from synapse.model.trace import forward_logits
from synapse.types import COMPONENTS, Scope

log = logging.getLogger(__name__)

Inputs = Sequence[Any] | np.ndarray
"""Raw inputs, one entry (or one row) an example: texts, pairs of texts, token ids, paths, arrays."""

_MOST_SAMPLES = 64
"""Samples among which those of unequal length are looked for."""

LESS_MEMORY = "use shorter inputs (--max-length), or a machine with more memory"
"""What helps where memory does not suffice for one example."""

STATE_NUMBERS = {"cpu": 400_000, "cuda": 25_000_000}
"""Numbers in one block output of a forward pass, at most."""

Result = TypeVar("Result")

LogitEdit = Callable[[Tensor], Tensor]
"""Takes logits (example, label) and returns what replaces them."""


Preprocess = Callable[[Any], Mapping[str, Tensor]]
"""Turns raw inputs into the keyword arguments of the model's forward, example first in every tensor.

Two methods are used where it has them: `lengths(inputs)`, so that examples of like length are batched together, and
`samples()`, raw inputs of unequal length on which the anatomy is proved.
"""


@runtime_checkable
class Perturbation(Protocol):
    """Whatever can be applied to a classifier for a while and then comes off again."""

    def applied(self, classifier: "Classifier") -> AbstractContextManager[None]:
        """Return a context in which the classifier is perturbed."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples that share a forward pass.

    `index[i]` is the position of example i in the list that was batched; `keys[i]` identifies its content, so that
    anything random about it depends on the example and not on its neighbours. `labels[i]` is its class, where that is
    known.
    """

    index: Int[np.ndarray, "example"]
    keys: tuple[int, ...]
    inputs: Mapping[str, Tensor]
    labels: Int[Tensor, "example"] | None = None

    def take(self, examples: Int[Tensor, "chosen"]) -> "Batch":
        """Return the chosen examples as a batch, padded as they were; an example may be chosen more than once."""
        chosen = examples.cpu().numpy()
        return Batch(
            self.index[chosen],
            tuple(self.keys[i] for i in chosen),
            {name: value[examples] for name, value in self.inputs.items()},
            None if self.labels is None else self.labels[examples],
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
        longest_sample: int = 1,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.module = module
        self.preprocess = preprocess
        self.labels = labels
        self.anatomy = anatomy
        self.name = name
        self.device = device
        self.longest_sample = longest_sample
        self.notes = notes
        self.loaded_from: Mapping[str, Any] | None = None
        """What `load_classifier` was told, where the module came from there."""
        self.blocks = tuple(module.get_submodule(block) for block in anatomy.blocks)
        # Rows of one forward pass: few enough to stay in a CPU's cache, many enough to keep a GPU busy.
        self.max_tokens = max(128, STATE_NUMBERS[device.type] // anatomy.width)
        self._batch: Batch | None = None
        self._logit_edits: list[LogitEdit] = []
        self._is_studied = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process is sent: a mode that this one is in does not hold there."""
        return {**self.__dict__, "_batch": None, "_is_studied": False}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        labels: Sequence[Any] | None = None,
        device: str = "auto",
        max_length: int | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        blocks: str | Sequence[str] | None = None,
        readout: str | None = None,
        mlp: str | None = None,
        attention: str | None = None,
        final: str | None = None,
    ) -> "Classifier":
        """Return the classifier of texts, images or sounds in a local folder, or of a hub id when there is a network.

        `labels` overrides the names in the model's `id2label`, in the order of the logits. `max_length` cuts texts
        shorter than the model's own limit. Weights run in float32, or with `dtype="auto"` as they are stored. Code that
        comes with a model runs only with `trust_remote_code`. The other options override findings, see `from_module`.

        Raises:
            ModelError: nothing to load there, or no fine-tuned single-label classification head.
            AnatomyError: the model's parts could not be found or proved.
        """
        options: dict[str, Any] = {"max_length": max_length, "dtype": dtype, "trust_remote_code": trust_remote_code}
        loaded = load_classifier(model, **options)
        found = cls.from_module(
            loaded.module,
            preprocess=loaded.preprocess,
            labels=loaded.labels if labels is None else labels,
            name=Path(str(model)).name,
            device=device,
            blocks=blocks,
            readout=readout,
            mlp=mlp,
            attention=attention,
            final=final,
            notes=loaded.notes,
        )
        place = str(Path(model).resolve()) if Path(model).exists() else str(model)
        found.loaded_from = {"model": place, **options}
        return found

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        preprocess: Any,
        labels: Sequence[Any] | None = None,
        sample: Inputs | None = None,
        name: str = "",
        device: str = "auto",
        blocks: str | Sequence[str] | None = None,
        readout: str | None = None,
        mlp: str | None = None,
        attention: str | None = None,
        final: str | None = None,
        notes: Sequence[str] = (),
    ) -> "Classifier":
        """Return a classifier around any `nn.Module` whose forward gives logits.

        `preprocess` turns raw inputs into forward arguments (see `Preprocess`); a tokenizer, an image processor or a
        feature extractor of the model library does as well. `labels` are class names in the order of the logits, by
        default those of the module's own configuration. `sample` holds two or more raw inputs, best of unequal length;
        the anatomy is found and proved on the longest, the shortest, and at most two between.

        Findings can be given by hand: `blocks` by their names in `module.named_modules()` or one pattern such as
        `encoder.layer.*`; `readout`, see `synapse.types.Readout`; `mlp` and `attention` as names, inside a
        block, of the down and the output projection; `final`, the linear map that gives the logits.

        Raises:
            SettingsError: fewer than two labels, labels that repeat or are empty, fewer than two samples, a preprocess
                that returns no tensors with the example first, or an override that names nothing.
            ModelError, AnatomyError: as `from_pretrained`.
        """
        if module.training:
            raise ModelError("The module is in training mode, so its answers are random; call `module.eval()` first.")
        preprocess = preprocess_for(preprocess, module)
        names = _checked_labels(_own_labels(module) if labels is None else labels)
        if sample is None:
            sample = preprocess.samples() if hasattr(preprocess, "samples") else ()
        if len(sample) < 2:
            raise SettingsError(
                f"{len(sample)} sample inputs were given; two or more are needed to prove the anatomy: pass `sample=`."
            )
        place = choose_device(device)
        module.to(place)
        sample = sample[:_MOST_SAMPLES]
        lengths = _lengths(preprocess, sample)
        tried = _few(lengths)
        with study_mode(module):
            anatomy = find_anatomy(
                module,
                _on(place, _checked_tensors(preprocess(_chosen(sample, tried)), len(tried))),
                len(names),
                alone=_on(place, preprocess(_chosen(sample, tried[-1:]))),
                overrides=Overrides(blocks, readout, mlp, attention, final),
            )
        if hasattr(preprocess, "lengths") and len(np.unique(lengths)) == 1:
            # Nothing was padded, so nothing is known of padding.
            anatomy = replace(anatomy, n_tokens_follow_length=True, pads=False)
            notes = (*notes, "the samples are of one length, so examples of different lengths never share a batch")
        notes = (*notes, *getattr(preprocess, "notes", ()), *_weight_notes(module, anatomy))
        name = name or type(module).__name__
        longest = max(1, int(lengths.max()))
        return cls(
            module,
            preprocess,
            names,
            anatomy,
            name=name,
            device=place,
            longest_sample=longest,
            notes=tuple(dict.fromkeys(notes)),
        )

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Number of units of a block's output."""
        return self.anatomy.width

    def sites(self, component: str = "residual") -> tuple[Site, ...]:
        """Return the sites of a component, one a layer.

        Raises:
            SettingsError: an unknown component, or one that this classifier does not have; the message says why.
        """
        if component not in COMPONENTS:
            known = ", ".join(COMPONENTS)
            raise SettingsError(f"There is no component {component!r}; there are {known}.{near(component, COMPONENTS)}")
        found = self.anatomy.sites.get(component)
        if found is None:
            raise SettingsError(
                f"This classifier has no site {component!r}: {self.anatomy.missing[component]}. It has "
                f"{', '.join(self.anatomy.sites)}; a projection can be named with `mlp=` or `attention=`."
            )
        return found

    @property
    def final(self) -> nn.Module | None:
        """The linear map that gives the logits, if the head ends in one."""
        return None if self.anatomy.final is None else self.module.get_submodule(self.anatomy.final)

    def head_weight(self) -> Float[Tensor, "label feature"]:
        """Return the matrix of the final linear map, (label, feature).

        Raises:
            SettingsError: the head does not end in one.
        """
        final = self.final
        if final is None:
            raise SettingsError(
                "The head does not end in a linear map; an attack on it, or an edit of it, is left out."
            )
        weight = final.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def batches(self, inputs: Inputs, targets: Int[np.ndarray, "example"] | None = None) -> Iterator[Batch]:
        """Yield the inputs in batches of like length, each at most `max_tokens` rows; `targets` are their classes.

        Where padding moves a model's logits, or its rows cannot be told from padding, a batch holds one length.
        """
        for index in self.buckets(inputs):
            yield self.batch(inputs, index, targets)

    def buckets(self, inputs: Inputs) -> list[Int[np.ndarray, "example"]]:
        """Return the positions of the inputs in every batch."""
        anatomy, lengths = self.anatomy, getattr(self.preprocess, "lengths", None)
        if lengths is None or not anatomy.n_tokens_follow_length:
            size = max(1, self.max_tokens // anatomy.n_tokens) if anatomy.pads else 1
            return length_buckets(np.ones(len(inputs), dtype=np.int64), batch_size=size)
        # A sound's length is counted in samples, of which many make a row.
        max_length = max(1, round(self.max_tokens * self.longest_sample / anatomy.n_tokens))
        same = length_buckets if anatomy.pads else equal_lengths
        return same(lengths(inputs), batch_size=256, max_tokens=max_length)

    def batch(
        self, inputs: Inputs, index: Int[np.ndarray, "chosen"], targets: Int[np.ndarray, "example"] | None = None
    ) -> Batch:
        """Return the inputs at these positions as one batch; `targets` are the classes of all inputs."""
        chosen = _chosen(inputs, index)
        tensors = self.preprocess(chosen)
        self._check_size(tensors)
        keys = tuple(_content_key(item) for item in chosen)
        labels = None if targets is None else torch.from_numpy(targets[index]).to(self.device)
        return Batch(index, keys, _on(self.device, tensors), labels)

    def _check_size(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse inputs that vary in size where the samples did not: whether they may share a batch was not tried."""
        if self.anatomy.n_tokens_follow_length:
            return
        for name, shape in self.anatomy.shapes.items():
            if tensors[name].shape[1:] != shape:
                raise ModelError(
                    f"The input {name!r} has the shape {tuple(tensors[name].shape[1:])} an example, and that of all "
                    f"samples was {tuple(shape)}; what varies in size must vary in the samples too, so that padding is "
                    "tried. Pass `sample=` of unequal sizes."
                )

    def predict(self, examples: Examples | Inputs) -> Float[np.ndarray, "example label"]:
        """Return the logits of every example, in the order given, in float32."""
        inputs = examples.inputs if isinstance(examples, Examples) else examples
        targets = self._known_targets(examples) if isinstance(examples, Examples) else None
        logits = np.empty((len(inputs), len(self.labels)), dtype=np.float32)
        for batch in self.batches(inputs, targets):
            for part, found, _ in in_halves(batch, self.forward):
                logits[part.index] = found.float().cpu().numpy()
        return logits

    def _known_targets(self, examples: Examples) -> Int[np.ndarray, "example"] | None:
        """Return the classes of the examples, or None where they are labelled otherwise: to predict needs no labels."""
        try:
            return examples.targets(self.labels)
        except LabelError:
            return None

    def forward(self, batch: Batch) -> Float[Tensor, "example label"]:
        """Return the logits of one batch, under whatever perturbation is applied."""
        with self.running(batch), torch.inference_mode(), self.studied():
            logits = forward_logits(self.module, batch.inputs)
            for edit in self._logit_edits:
                logits = edit(logits)
            return logits

    @contextmanager
    def studied(self) -> Iterator[None]:
        """Keep the module in the mode in which it is studied, once for many forward passes."""
        if self._is_studied:
            yield
            return
        with study_mode(self.module):
            self._is_studied = True
            try:
                yield
            finally:
                self._is_studied = False

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

    def readout_weights(self, batch: Batch, site: Site, n_tokens: int) -> Float[Tensor, "example token"]:
        """Return how much each row of a site counts in the readout state; the rows of an example sum to 1."""
        if site.layout == "example unit":
            return torch.ones(len(batch.index), 1, device=self.device)
        return self.anatomy.rows(batch.inputs, n_tokens)

    def readout_row(self, batch: Batch, n_tokens: int) -> Int[Tensor, "example"] | None:
        """Return the one row of every example that the head reads; None where it reads several, or was not proved."""
        anatomy = self.anatomy
        if anatomy.readout not in ("first", "last") or not anatomy.readout_is_proved:
            return None
        return anatomy.rows(batch.inputs, n_tokens).argmax(dim=1)

    def readout_state(
        self, batch: Batch, site: Site, states: Float[Tensor, "example token unit"]
    ) -> Float[Tensor, "example unit"]:
        """Return the state of the row that the head reads, or the mean of those that it reads, in float32."""
        weights = self.readout_weights(batch, site, states.shape[1])
        if bool(((weights == 0) | (weights == 1)).all()):
            return states[weights == 1].float()
        return torch.einsum("et,etu->eu", weights, states.float())

    def rows(self, batch: Batch, site: Site, n_tokens: int, scope: Scope) -> Bool[Tensor, "example token"] | None:
        """Return which rows of a site a scope edits; None stands for all."""
        if scope == "all" or site.layout == "example unit":
            return None
        if scope == "non-padding":
            return self.anatomy.rows.rows(batch.inputs, n_tokens)
        return self.readout_weights(batch, site, n_tokens) > 0

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
        sites = {component: [site.module for site in found] for component, found in anatomy.sites.items()}
        return {
            "name": self.name,
            "n_blocks": self.n_layers,
            "width": self.width,
            "blocks": list(anatomy.blocks),
            "readout": anatomy.readout,
            "head": list(anatomy.head),
            "final": anatomy.final,
            "n_heads": anatomy.n_heads,
            "sites": sites,
            "widths": {component: found[0].width for component, found in anatomy.sites.items()},
            "missing": dict(anatomy.missing),
            "pads": anatomy.pads,
            "labels": list(self.labels),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "notes": list(self.notes),
            "proofs": dict(anatomy.proofs),
        }

    def weights_hash(self) -> str:
        """Return the SHA-256 of all parameters and buffers, names and bytes."""
        return hash_tensors(self.module.state_dict())


def in_halves(batch: Batch, run: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result, bool]]:
    """Yield what `run` returns for a batch, in halves where memory runs out: each part, and whether it is the last.

    Raises:
        ResourceError: memory does not suffice for a single example.
    """
    waiting, failed = [batch], None
    while waiting:
        part = waiting.pop()
        try:
            result = run(part)
        except (torch.OutOfMemoryError, MemoryError) as error:
            n = len(part.index)
            if part is failed:
                raise ResourceError(f"Memory ran out with a single example; {LESS_MEMORY}.") from error
            log.warning("Memory ran out with %d examples in a pass; it goes on with half of them.", n)
            # A single example is tried once more: what took the memory may be gone by now.
            failed = part if n == 1 else None
            examples = torch.arange(n)
            waiting += [part] if n == 1 else [part.take(examples[n // 2 :]), part.take(examples[: n // 2])]
            continue
        yield part, result, not waiting
        del result  # before the next part is run


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


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of the tensors, in order of their names.

    Quantised maps keep tensors inside tuples of other values, which are hashed with what they hold.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _digest_value(digest, name, tensors[name])
    return digest.hexdigest()


def _digest_value(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for position, entry in enumerate(value):
            _digest_value(digest, f"{name}[{position}]", entry)
        return
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value!r}".encode())
        return
    tensor = value.detach().cpu()
    if tensor.is_quantized:
        digest.update(f"{name} {tensor.qscheme()} {tensor.dequantize().flatten().tolist()}".encode())
        return
    tensor = tensor.contiguous()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())


def _checked_labels(given: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise SettingsError(
            f"The labels are the text {given!r}; a list of names, in the order of the logits, was expected."
        )
    labels = tuple(str(label) for label in given)
    if len(labels) < 2 or len(set(labels)) < len(labels) or "" in labels:
        raise SettingsError(
            f"The labels are {list(labels)}; two or more distinct, non-empty names in the order of the logits were "
            "expected. A regression head (one output) cannot be studied: it has no classes to redirect between."
        )
    return labels


def _own_labels(module: nn.Module) -> tuple[str, ...]:
    names = getattr(getattr(module, "config", None), "id2label", None) or {}
    if not names or set(names) != set(range(len(names))):
        raise SettingsError("The module names no classes of its own; pass `labels=`, in the order of the logits.")
    return tuple(str(names[position]) for position in range(len(names)))


def _few(lengths: Int[np.ndarray, "example"]) -> Int[np.ndarray, "tried"]:
    """Return up to four positions, the longest example first and the shortest last; two where all are of one length."""
    longest_first: Int[np.ndarray, "example"] = np.argsort(-lengths, kind="stable")
    n = min(4 if len(np.unique(lengths)) > 1 else 2, len(lengths))
    tried: Int[np.ndarray, "tried"] = longest_first[np.linspace(0, len(lengths) - 1, n).astype(int)]
    return tried


def _checked_tensors(tensors: Any, n_examples: int) -> Mapping[str, Tensor]:
    """Refuse what a preprocess should not return."""
    if not isinstance(tensors, Mapping) or not tensors:
        raise SettingsError(
            f"`preprocess` returned a {type(tensors).__name__}; a dictionary of tensors by the names of the forward's "
            "arguments was expected."
        )
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n_examples:
            seen = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise SettingsError(
                f"`preprocess` returned {seen} as {name!r} for {n_examples} examples; a tensor with the example first "
                "was expected. Bind what is the same for all examples with functools.partial, or in a wrapper module."
            )
    return tensors


def _weight_notes(module: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    """Yield what a reader of the numbers should know of the precision of the weights."""
    types = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()} - {"float32"}
    if types:
        yield f"the model runs in {' and '.join(sorted(types))}, so its numbers are coarser than those of float32"
    blocks = [module.get_submodule(block) for block in dict.fromkeys(anatomy.blocks)]
    if not all(any(p.ndim >= 2 and p.is_floating_point() for p in block.parameters()) for block in blocks):
        yield "blocks hold quantised weights, or none: weight noise leaves them out"


def _lengths(preprocess: Any, sample: Inputs) -> Int[np.ndarray, "example"]:
    """Return the sample's lengths, or how many numbers each input is alone where nothing else tells them."""
    if hasattr(preprocess, "lengths"):
        return np.asarray(preprocess.lengths(sample), dtype=np.int64)
    alone = [preprocess(_chosen(sample, np.array([position]))) for position in range(len(sample))]
    sizes = [sum(value.numel() for value in _checked_tensors(tensors, 1).values()) for tensors in alone]
    return np.array(sizes, dtype=np.int64)


def _chosen(inputs: Inputs, index: Int[np.ndarray, "example"]) -> Any:
    return inputs[index] if isinstance(inputs, np.ndarray) else [inputs[i] for i in index]


def _on(device: torch.device, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}


def _content_key(item: Any) -> int:
    return int.from_bytes(hashlib.blake2b(content_bytes(item), digest_size=8).digest(), "little")
