"""Turn raw inputs into the tensors that a classifier's forward takes: texts, images and sounds.

| processor | recognised by | one input |
|---|---|---|
| tokenizer | `pad` and `convert_tokens_to_ids` | a text, a pair of texts, or a complete sequence of token ids |
| image processor | the library's base class, `image_mean` | a file, an array (height, width[, channel]), a PIL image |
| feature extractor | `sampling_rate` | a wav file, or an array of samples at that rate |

All three are called on a sequence of inputs and return tensors with the example first. They share

- `lengths(inputs)` (texts and sounds): how long every input is, which decides what shares a batch;
- `samples()`: a few raw inputs of unequal length, on which a classifier's anatomy is proved;
- `notes`: sentences about what was settled on the way, for the reader of a report;
- `padding_is_masked`: whether a model can tell padding from input. Where it cannot, only inputs of equal length may
  share a batch, or the answer to one would depend on the others.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from scipy.signal import resample_poly
from torch import Tensor, nn

from synapse.data.inputs import KIND_WORDS, kind_of
from synapse.data.media import read_image, read_sound
from synapse.errors import DataError, ModelError, SettingsError

Preprocess = Callable[[Any], Mapping[str, Tensor]]
"""Turns raw inputs into the keyword arguments of the model's forward, example first in every tensor."""

SAMPLE_TEXTS = (
    "A short text.",
    "A second text, rather longer than the first, so that a batch of both is padded.",
    "Not so long, and about something else.",
    "The fourth and longest of these texts speaks of weather, trade and music: rain fell, prices rose, and they sang.",
)
SAMPLE_SECONDS = (0.2, 0.4, 0.25, 0.3)
"""How long the sounds are; the convolutions of a speech model see 25 ms at once."""
N_SAMPLE_IMAGES = 4
SAMPLE_SEED = 0

DEFAULT_MAX_LENGTH = 512
"""Tokens at which texts are cut where neither tokenizer nor model has a limit: it keeps them affordable."""

_COLOURS = {1: "L", 3: "RGB", 4: "RGBA"}
_NO_RULES = frozenset(
    (
        *("name_or_path", "files_loaded", "init_inputs", "init_kwargs", "deprecation_warnings", "verbose"),
        *("_vocab", "_merges", "_scores"),
    )
)
"""What a tokenizer holds beside its rules: where it came from, and what its backend holds too."""

_AT_ONCE = 4096
"""Texts whose tokens are held at a time to be counted."""
_NO_LIMIT = 1_000_000  # tokenizers without a limit say 1e30


@dataclass(frozen=True, eq=False)
class TextPreprocess:
    """Tokenises texts and pairs, pads on the tokenizer's side to the longest of the batch, cuts at `max_length` tokens.

    `arguments` are the names that the forward takes, or None if it takes any.
    """

    tokenizer: Any
    max_length: int
    arguments: frozenset[str] | None = None
    notes: tuple[str, ...] = ()
    padding_is_masked: bool = True

    def __call__(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Return token ids and masks, (example, token).

        Raises:
            DataError: inputs that are no texts, pairs or token ids, of several kinds, or more ids than `max_length`.
        """
        if self._kind(inputs) == "ids":
            return self._padded(inputs)
        return _accepted(self._encode(inputs, padding=True, return_tensors="pt"), self.arguments)

    def lengths(self, inputs: Sequence[Any]) -> Int[np.ndarray, "example"]:
        """Return the number of tokens of every input."""
        lengths: list[int] = []
        for start in range(0, len(inputs), _AT_ONCE):
            some = inputs[start : start + _AT_ONCE]
            counted = {"return_attention_mask": False, "return_token_type_ids": False}
            rows = some if self._kind(some) == "ids" else self._encode(some, **counted)["input_ids"]
            lengths += map(len, rows)
        return np.array(lengths, dtype=np.int64)

    def samples(self) -> Sequence[str]:
        """Return a few texts of unequal length."""
        return SAMPLE_TEXTS

    def fingerprint(self) -> str | None:
        """Return a hash of all that decides what a text becomes; None where the tokenizer does not tell all of it."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        rules = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # those of the last call
            rules.pop(name, None)
        simple = (str, int, float, bool, list, tuple, dict, type(None))
        own = {name: value for name, value in vars(self.tokenizer).items() if name not in _NO_RULES}
        settings = {name: repr(value) for name, value in own.items() if isinstance(value, simple)}
        kind = type(self.tokenizer)
        whole = [
            kind.__module__,
            kind.__qualname__,
            rules,
            settings,
            self.max_length,
            sorted(self.arguments or ["any"]),
        ]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def _kind(self, inputs: Sequence[Any]) -> str:
        kinds = list(dict.fromkeys("ids" if _is_id_array(item) else kind_of(item) for item in inputs))
        if len(kinds) == 1 and kinds[0] in ("text", "pair", "ids"):
            return kinds[0]
        seen = " and ".join(KIND_WORDS[kind] for kind in kinds) or "nothing"
        raise DataError(
            f"The classifier reads texts, but {seen} came in one batch; give texts, pairs of texts or tuples of token "
            "ids, all of one kind."
        )

    def _encode(self, inputs: Sequence[Any], **options: Any) -> Any:
        columns = zip(*inputs, strict=True) if self._kind(inputs) == "pair" else [inputs]
        return self.tokenizer(
            *(list(column) for column in columns), truncation=True, max_length=self.max_length, **options
        )

    def _padded(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        longest = max(len(row) for row in inputs)
        if longest > self.max_length:
            raise DataError(
                f"An input has {longest} token ids, but {self.max_length} are the most that the classifier takes; "
                "token ids are complete sequences and are not cut, so shorten it with its last token in place."
            )
        ids = torch.full((len(inputs), longest), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(inputs):
            left = longest - len(row) if self.tokenizer.padding_side == "left" else 0
            ids[i, left : left + len(row)] = torch.tensor([int(token) for token in row])
            mask[i, left : left + len(row)] = 1
        return _accepted({"input_ids": ids, "attention_mask": mask}, self.arguments)


@dataclass(frozen=True, eq=False)
class ImagePreprocess:
    """Brings images to the model's size and range, with the model's image processor.

    `channels` are what the model reads: 3 (colours) or 1 (grey levels); images are converted. `sample_size` is the
    height and width of the samples in pixels.
    """

    processor: Any
    channels: int = 3
    sample_size: tuple[int, int] = (224, 224)
    dtype: torch.dtype = torch.float32
    arguments: frozenset[str] | None = None
    notes: tuple[str, ...] = ()
    padding_is_masked: bool = True

    def __call__(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Return pixel values, (example, channel, height, width).

        Arrays are uint8 in 0..255, or floats in [0, 1], which are brought to the same 256 levels.

        Raises:
            DataError: a file that is no image, or an array of another shape, type or range.
        """
        images = [self._pixels(item) for item in inputs]
        if self.channels == 3 and all(image.dtype == np.uint8 for image in images):
            made = self.processor([Image.fromarray(image) for image in images], return_tensors="pt")
        else:
            made = self.processor(images, input_data_format="channels_last", return_tensors="pt")
        return _accepted(made, self.arguments, self.dtype)

    def samples(self) -> Sequence[UInt8[np.ndarray, "height width channel"]]:
        """Return a few images of noise."""
        rng = np.random.default_rng(SAMPLE_SEED)
        shape = (*self.sample_size, self.channels)
        return [rng.integers(0, 256, size=shape, dtype=np.uint8) for _ in range(N_SAMPLE_IMAGES)]

    def _pixels(self, item: Any) -> np.ndarray:
        """Return one image, (height, width, channel)."""
        if isinstance(item, Path):
            item = read_image(item)
        if isinstance(item, Image.Image):
            return self._converted(item)
        array = np.asarray(item)
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim != 3 or not array.size or (array.shape[2] != self.channels and array.shape[2] not in _COLOURS):
            raise DataError(
                f"An image has the shape {np.shape(item)}; (height, width) or (height, width, channel) was expected, "
                f"with {self.channels} channel{'s' * (self.channels > 1)}."
            )
        if getattr(self.processor, "do_rescale", True):
            array = _levels(array)
        if array.shape[2] == self.channels or array.dtype != np.uint8:
            return array
        return self._converted(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array))

    def _converted(self, image: Image.Image) -> UInt8[np.ndarray, "height width channel"]:
        if self.channels not in _COLOURS:
            raise DataError(
                f"The classifier reads images of {self.channels} channels, which no image file has; give arrays "
                f"(height, width, {self.channels})."
            )
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # 16 bits to 8: a plain conversion would clip
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise DataError(
                f"An image is stored in the mode {image.mode!r}, whose range of values is not known; save it with 8 or "
                "16 bits a channel."
            )
        if "transparency" in image.info:
            image = image.convert("RGBA")
        pixels = np.asarray(image.convert(_COLOURS[self.channels]))
        return pixels[..., None] if pixels.ndim == 2 else pixels


@dataclass(frozen=True, eq=False)
class AudioPreprocess:
    """Brings sounds to the extractor's sampling rate and to the values that the model reads.

    Sounds are cut at `max_length` samples, if it is given.
    """

    extractor: Any
    max_length: int | None = None
    dtype: torch.dtype = torch.float32
    arguments: frozenset[str] | None = None
    notes: tuple[str, ...] = ()
    padding_is_masked: bool = True

    def __call__(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Return samples, (example, sample), or spectra, (example, frame, band), and a mask if the extractor makes one.

        Arrays are taken at the extractor's rate; the samples of files are resampled to it.

        Raises:
            DataError: a file that is no sound, or an array of another shape or type.
        """
        sounds = [self._sound(item) for item in inputs]
        made = self.extractor(sounds, sampling_rate=self.rate, return_tensors="pt", **_padding(self.extractor))
        return _accepted(made, self.arguments, self.dtype)

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.extractor.sampling_rate)

    def lengths(self, inputs: Sequence[Any]) -> Int[np.ndarray, "example"]:
        """Return the number of samples of every sound, at the extractor's rate."""
        return np.array([len(self._sound(item)) for item in inputs], dtype=np.int64)

    def samples(self) -> Sequence[Float[np.ndarray, "_"]]:
        """Return a few sounds of noise of unequal length."""
        rng = np.random.default_rng(SAMPLE_SEED)
        return [rng.normal(0, 0.1, size=int(seconds * self.rate)).astype(np.float32) for seconds in SAMPLE_SECONDS]

    def _sound(self, item: Any) -> Float[np.ndarray, "sample"]:
        if isinstance(item, Path):
            return _resampled(*read_sound(item), rate=self.rate)[: self.max_length]
        array = np.asarray(item)
        if array.ndim != 1 or not array.size or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise DataError(
                f"A sound is an array of shape {array.shape} and type {array.dtype}; the path of a wav file, or one "
                f"row of finite floats in [-1, 1] at {self.rate} samples a second, was expected."
            )
        return array.astype(np.float32)[: self.max_length]


def preprocess_for(processor: Any, module: nn.Module, *, max_length: int | None = None) -> Preprocess:
    """Return the preprocessing that a tokenizer, image processor or feature extractor stands for.

    Of a processor with several of these parts, the one that makes the module's main input is taken. Another callable
    is returned as it is. Neither the processor nor the module is altered.

    Raises:
        ModelError: not callable, or a tokenizer and a module that do not agree on how to pad.
        SettingsError: a `max_length` below 1, or one for images.
    """
    if max_length is not None and max_length < 1:
        raise SettingsError(f"max_length is {max_length}; 1 or more was expected.")
    processor = _part(processor, module)
    arguments = _arguments(module)
    if _is_tokenizer(processor):
        return _text_preprocess(processor, module, arguments, max_length)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if _is_image_processor(processor):
        if max_length is not None:
            raise SettingsError(f"max_length is {max_length}, but the classifier reads images, which are never cut.")
        config = getattr(module, "config", None)
        channels = getattr(config, "num_channels", None) or len(getattr(processor, "image_mean", None) or "RGB")
        return ImagePreprocess(processor, channels, _image_size(processor, config), dtype, arguments)
    if hasattr(processor, "sampling_rate"):
        return _audio_preprocess(AudioPreprocess(processor, max_length, dtype, arguments))
    if callable(processor):
        return processor  # type: ignore[no-any-return]
    raise ModelError(
        f"The preprocessing is a {type(processor).__name__}; a tokenizer, an image processor, a feature extractor or a "
        "function from raw inputs to tensors was expected."
    )


def padding_token(tokenizer: Any, module: nn.Module) -> str:
    """Return the token to pad with: the one that the module takes for padding, if the tokenizer has it.

    A decoder reads the last token that is not the padding of its configuration, so its word goes first; then come the
    tokenizer's own, and its end token. An end token that closes every text cannot stand in: with it for padding, a
    decoder would read the token before.

    Raises:
        ModelError: none of the three is there, or the end token closes texts.
    """
    known = padding_id(module)
    token = tokenizer.convert_ids_to_tokens(known) if known is not None and known < len(tokenizer) else None
    token = token or tokenizer.pad_token
    if token is None:
        token = tokenizer.eos_token
        if token is None or tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
            end = "no end token that could stand in" if token is None else f"its end token {token!r} closes every text"
            raise ModelError(
                f"The tokenizer ({type(tokenizer).__name__}) has no padding token, and {end}; name one that occurs in "
                "no text, `tokenizer.pad_token = ...`, and save the tokenizer with the model."
            )
    return str(token)


def padding_id(module: nn.Module) -> int | None:
    """Return the token id that the module's configuration names as padding, or None."""
    known = getattr(text_config(module), "pad_token_id", None)
    return known if isinstance(known, int) and known >= 0 else None  # some configurations say -1 for none


def text_config(module: nn.Module) -> Any:
    """Return the part of the module's configuration that speaks of tokens, or None if it has no configuration."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _text_preprocess(
    tokenizer: Any, module: nn.Module, arguments: frozenset[str] | None, max_length: int | None
) -> TextPreprocess:
    token = padding_token(tokenizer, module)
    pad_id = tokenizer.convert_tokens_to_ids(token)
    if hasattr(text_config(module), "pad_token_id") and padding_id(module) != pad_id:
        raise ModelError(
            f"The configuration of {type(module).__name__} has pad_token_id {text_config(module).pad_token_id}, but "
            f"texts are padded with {token!r}; add `module.config.pad_token_id = {pad_id}` before this call."
        )
    notes = []
    if tokenizer.pad_token != token:
        own = f"pads with {tokenizer.pad_token!r}" if tokenizer.pad_token else "has no padding token"
        name = "its end token" if token == tokenizer.eos_token else "the model's padding token"
        notes.append(f"the tokenizer {own}; {name} {token!r} is used")
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = token
    limit, reason = _limit(tokenizer, module, max_length)
    notes.append(f"long texts are cut at {limit} tokens because {reason}")
    return TextPreprocess(tokenizer, limit, arguments, tuple(notes))


def _limit(tokenizer: Any, module: nn.Module, asked: int | None) -> tuple[int, str]:
    """Return how many tokens an input may have, and why."""
    limits = [
        (asked, "max_length says so"),
        (_positions(module), "the model has no more positions"),
        (tokenizer.model_max_length, "the tokenizer allows no more"),
    ]
    # A model without absolute positions may say -1.
    known = [(int(limit), reason) for limit, reason in limits if limit is not None and 0 < limit < _NO_LIMIT]
    return min(known, key=lambda each: each[0], default=(DEFAULT_MAX_LENGTH, "neither tokenizer nor model has a limit"))


def _positions(module: nn.Module) -> int | None:
    """Return how many positions the model has room for; an embedding with a padding index begins behind that index."""
    declared = getattr(text_config(module), "max_position_embeddings", None)
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.num_embeddings == declared and part.padding_idx is not None:
            return int(declared) - part.padding_idx - 1
    return declared


def _image_size(processor: Any, config: Any) -> tuple[int, int]:
    """Return a height and width that the processor brings to the model's, or that are the model's already."""
    size = getattr(config, "image_size", None)
    if size is None:
        named = getattr(processor, "size", None)
        size = next(iter(dict(named).values()), None) if isinstance(named, Mapping) else None
    if isinstance(size, (tuple, list)):
        return int(size[0]), int(size[1])
    return (int(size), int(size)) if size else (224, 224)


def _audio_preprocess(preprocess: AudioPreprocess) -> AudioPreprocess:
    """Return it with what it does about padding found out, on two sounds of unequal length."""
    shorter, longer = sorted(preprocess.samples(), key=len)[:: len(SAMPLE_SECONDS) - 1]
    alone, both = preprocess([shorter]), preprocess([longer, shorter])
    # Spectra of a fixed size are filled up to it in the same way in every batch.
    fixed = all(alone[name].shape[1:] == both[name].shape[1:] for name in both)
    if fixed or "attention_mask" in both:
        return preprocess
    note = "the feature extractor makes no mask of padding, so only sounds of equal length share a batch"
    return AudioPreprocess(
        preprocess.extractor,
        preprocess.max_length,
        preprocess.dtype,
        preprocess.arguments,
        (note,),
        padding_is_masked=False,
    )


def _padding(extractor: Any) -> dict[str, bool]:
    """Return the option that pads to the longest, unless the extractor pads by itself: some need a fixed size."""
    option = inspect.signature(type(extractor).__call__).parameters.get("padding")
    return {"padding": True} if option is not None and option.default in (False, None) else {}


def _resampled(samples: Float[np.ndarray, "_"], own_rate: int, *, rate: int) -> Float[np.ndarray, "_"]:
    if own_rate == rate:
        return samples
    common = gcd(own_rate, rate)
    return np.asarray(resample_poly(samples, rate // common, own_rate // common), dtype=np.float32)


def _levels(array: np.ndarray) -> UInt8[np.ndarray, "height width channel"]:
    """Return an image in the 256 levels of an image file, which the processor then scales as the model wants them."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
        return (array * 255).round().astype(np.uint8)
    raise DataError(
        f"An image is an array of type {array.dtype} with values from {array.min():g} to {array.max():g}; uint8 in "
        "0..255 or floats in [0, 1] were expected, so scale it."
    )


def _part(processor: Any, module: nn.Module) -> Any:
    """Return the part of the library's processors of several kinds of inputs that makes the module's main input."""
    from transformers import ProcessorMixin

    if not isinstance(processor, ProcessorMixin):
        return processor
    wanted = getattr(module, "main_input_name", None)
    for name in ("tokenizer", "image_processor", "feature_extractor"):
        part = getattr(processor, name, None)
        if part is not None and wanted in getattr(part, "model_input_names", ()):
            return part
    return processor


def _is_tokenizer(processor: Any) -> bool:
    return hasattr(processor, "pad") and hasattr(processor, "convert_tokens_to_ids")


def _is_image_processor(processor: Any) -> bool:
    from transformers.image_processing_utils import ImageProcessingMixin

    return isinstance(processor, ImageProcessingMixin) or hasattr(processor, "image_mean")


def _is_id_array(item: Any) -> bool:
    return isinstance(item, np.ndarray) and item.ndim == 1 and item.dtype.kind in "iu"


def _arguments(module: nn.Module) -> frozenset[str] | None:
    """Return the names that the module's forward takes, or None if it names none of them."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    # A forward with names and **options passes the options on to places where a further input means nothing.
    return frozenset(named) or None


def _accepted(
    made: Mapping[str, Tensor], arguments: frozenset[str] | None, dtype: torch.dtype | None = None
) -> Mapping[str, Tensor]:
    """Return the tensors that the forward takes, floats in the module's own type."""
    return {
        name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in made.items()
        if arguments is None or name in arguments
    }
