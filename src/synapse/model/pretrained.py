"""Load a fine-tuned classifier of the model library, whatever it reads, and refuse what is none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from synapse.errors import ModelError, SettingsError, near
from synapse.model.preprocess import (
    Preprocess,
    padding_id,
    padding_token,
    preprocess_for,
    text_config,
)

DTYPES = ("float32", "auto", "bfloat16", "float16", "float64")
"""Types in which the weights can run; `auto` is the one that they are stored in."""

TASKS = {
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
}
"""The library's loaders of classifiers, with the library's tables of what each of them can load."""

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of weights that run code when they are read."""

# Versions of the library before 4.56 call the type of the weights by another name.
_DTYPE = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"

_DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class _Reader:
    """What turns raw inputs into a model's main input: its name, its loader, where that is defined, and its files."""

    what: str
    loader: str
    files: tuple[str, ...]
    options: Mapping[str, Any]
    place: str = "transformers"


_TOKENIZER = _Reader(
    "tokenizer",
    "AutoTokenizer",
    ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    {},
)
# The processors of the other backend, which some versions of the library call fast, need torchvision.
_IMAGES = _Reader(
    "image processor",
    "AutoImageProcessor",
    ("preprocessor_config.json", "processor_config.json"),
    {"backend": "pil"} if find_spec("transformers.image_processing_backends") else {"use_fast": False},
    "transformers.models.auto.image_processing_auto",  # some versions hide it elsewhere if there is no torchvision
)
_SOUNDS = _Reader(
    "feature extractor", "AutoFeatureExtractor", ("preprocessor_config.json", "processor_config.json"), {}
)

READERS = {"input_ids": _TOKENIZER, "pixel_values": _IMAGES, "input_values": _SOUNDS, "input_features": _SOUNDS}
"""What makes a model's main input, by the name of that input."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """What a model folder holds: the module in evaluation mode, its preprocessing, its class names.

    `labels` stand in the order of the logits. `notes` are sentences about what was done to weights and settings.
    """

    module: nn.Module
    preprocess: Preprocess
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()


def load_classifier(
    model: str | Path, *, max_length: int | None = None, trust_remote_code: bool = False, dtype: str = "float32"
) -> LoadedModel:
    """Return the classifier of texts, images or sounds in a local folder, or of a hub id.

    `max_length` cuts texts (in tokens) and sounds (in samples). `trust_remote_code` lets code in the folder run, where
    the model needs it. `dtype` is the type of the weights while they run: one of `DTYPES`. Quantised weights are loaded
    as the library does.

    Raises:
        ModelError: nothing there, not loadable, pickled weights only, code that is not trusted, a package missing, no
            classification head among the weights, a regression or multi-label head, or no tokenizer, image processor or
            feature extractor.
        SettingsError: no such `dtype`, or a `max_length` that cannot be.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} was expected.{near(dtype, DTYPES)}")
    _check_folder(model)
    with _quiet_library():
        config = _load(
            transformers.AutoConfig,
            model,
            "no readable config.json of a Transformer",
            trust_remote_code=trust_remote_code,
        )
        _check_task(model, config)
        loader = _model_class(model, config, trust_remote_code)
        _check_weight_files(model, config)
        quantised = _quantised_by(config)
        module, info = _load(
            loader,
            model,
            f"no {loader.__name__} in safetensors",
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            quantised=quantised,
            # Quantised weights come with the types that their kernels want.
            **{_DTYPE: "auto" if quantised else dtype},
        )
        _check_head(model, module, info)
        _check_quantised(model, module, quantised)
        reader, processor = _processor(model, module, trust_remote_code)
        notes = [
            *_weight_notes(model, module, quantised, dtype),
            *_left_out(module, info),
            *_code_notes(config, module, trust_remote_code),
            *(_settle_padding(module, processor) if reader is _TOKENIZER else ()),
        ]
        preprocess = preprocess_for(processor, module.eval(), max_length=max_length)
    return LoadedModel(module, preprocess, _labels(model, module), (*notes, *getattr(preprocess, "notes", ())))


def _check_folder(model: str | Path) -> None:
    """Refuse paths that cannot be model folders, before the library looks for them on the hub."""
    path = Path(model)
    looks_local = isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~"))
    if path.is_file():
        raise ModelError(f"{str(model)!r} is a file; the folder with config.json and model.safetensors was expected.")
    if (path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors")):
        raise ModelError(
            f"{str(model)!r} holds an adapter to another model, and no model; merge the two with `merge_and_unload()`, "
            "save the result with `save_pretrained`, and give that folder."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            f"The folder {str(model)!r} is no model: it has no config.json. Give one that `save_pretrained` wrote."
        )
    if not path.exists() and (looks_local or str(model).count("/") > 1):
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise ModelError(f"There is no model folder {str(model)!r}.{near(path.name, names)}")


def _check_task(model: str | Path, config: Any) -> None:
    task = getattr(config, "problem_type", None)
    if task == "regression":
        raise ModelError(
            f"{str(model)!r} is a regression model; a single-label classifier (one class for each example) was "
            "expected, so train one on classes, such as ranges of the values."
        )
    if task == "multi_label_classification":
        raise ModelError(
            f"{str(model)!r} is a multi label classification model; a single-label classifier (one class for each "
            "example) was expected, so study it label by label: wrap it in a module that returns (0, logit of the "
            "label) and give that to `Classifier.from_module`."
        )


def _model_class(model: str | Path, config: Any, trust_remote_code: bool) -> Any:
    """Return what loads the model: the class that it was saved as, if that is a classifier, or one for its config."""
    own_code = getattr(config, "auto_map", None) or {}
    own = [name for name in TASKS if name in own_code]
    if own and trust_remote_code:
        return getattr(transformers, own[0])
    fitting: dict[str, Any] = {}
    for table in (getattr(transformers, name) for name in TASKS.values()):
        if type(config) in table:
            classes = table[type(config)]
            fitting |= {cls.__name__: cls for cls in (classes if isinstance(classes, tuple) else (classes,))}
    saved_as = _saved_as(config)
    if saved_as in fitting:
        return fitting[saved_as]
    if saved_as.endswith(_heads()) and hasattr(transformers, saved_as):
        return getattr(transformers, saved_as)
    if fitting:
        return next(iter(fitting.values()))
    if own:
        raise _own_code_refused(model)
    raise ModelError(
        f"{str(model)!r} is a {saved_as or type(config).__name__} (model type {config.model_type!r}), for which "
        f"transformers {transformers.__version__} has no classifier; a model for one of {', '.join(TASKS)} was "
        "expected."
    )


def _heads() -> tuple[str, ...]:
    return tuple(name.removeprefix("AutoModel") for name in TASKS)


def _saved_as(config: Any) -> str:
    return next(iter(getattr(config, "architectures", None) or ()), "")


def _check_weight_files(model: str | Path, config: Any) -> None:
    """Refuse a folder whose only weights are pickled."""
    folder = Path(model)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not pickled:
        return
    danger = f"{str(model)!r} holds pickled weights only ({pickled[0]}), and a pickle can run code as it is read"
    if not any(name.startswith("pytorch_model") for name in pickled):
        raise ModelError(
            f"{danger}; load it in the program that wrote it and save it with `model.save_pretrained({str(model)!r})`, "
            "which writes safetensors."
        )
    name = next(
        (name for name, table in TASKS.items() if type(config) in getattr(transformers, table)), next(iter(TASKS))
    )
    raise ModelError(
        f"{danger}; if you trust the file, convert it once: "
        f'`python -c "from transformers import {name} as Model; '
        f'Model.from_pretrained({str(model)!r}, use_safetensors=False).save_pretrained({str(model)!r})"`.'
    )


def _check_head(model: str | Path, module: nn.Module, info: Mapping[str, Any]) -> None:
    config: Any = module.config
    saved_as = _saved_as(config)
    if info["mismatched_keys"]:
        first = min(info["mismatched_keys"])
        # Versions 4.51 to 4.57 of the library name the weights without the shapes.
        name, seen = (first, "another shape") if isinstance(first, str) else (first[0], f"the shape {tuple(first[1])}")
        raise ModelError(
            f"The weight {name} of {str(model)!r} has {seen}, but {tuple(module.state_dict()[name].shape)} follows "
            "from its config.json; put back the config.json that was saved with the weights."
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise ModelError(
            f"{str(model)!r} has no classification head: the weights {missing} are not in the checkpoint"
            f"{f' (it was saved as {saved_as})' if saved_as else ''}. Fine-tune it for classification first, then give "
            "its folder."
        )
    # Heads of other tasks can have weights of the same names: a class for each token, for instance.
    if saved_as != type(module).__name__ and hasattr(transformers, saved_as):
        raise ModelError(
            f"{str(model)!r} was saved as {saved_as}, whose head is for another task; a model saved as "
            f"{type(module).__name__} was expected, so fine-tune it for classification first."
        )
    if config.num_labels < 2:
        raise ModelError(
            f"{str(model)!r} has one output, so it is a regression model; two or more classes were expected. If the "
            "output is the logit of a yes, wrap the model in a module that returns (0, logit) and give that to "
            "`Classifier.from_module`."
        )


def _labels(model: str | Path, module: nn.Module) -> tuple[str, ...]:
    config: Any = module.config
    names = config.id2label
    if sorted(names) != list(range(len(names))):
        raise ModelError(
            f"The id2label of {str(model)!r} has the keys {sorted(names)}; 0 to {len(names) - 1}, in the order of the "
            "logits, were expected, so correct it in config.json."
        )
    return tuple(str(names[i]) for i in range(len(names)))


def _processor(model: str | Path, module: nn.Module, trust_remote_code: bool) -> tuple[_Reader, Any]:
    """Return what turns raw inputs into the module's main input, with its description."""
    main_input: Any = module.main_input_name
    reader = READERS.get(main_input) if isinstance(main_input, str) else None
    if reader is None:
        raise ModelError(
            f"{str(model)!r} ({type(module).__name__}) reads {main_input!r}; a model that reads one of "
            f"{', '.join(READERS)} was expected. Give the module and a preprocessing of your own to "
            "`Classifier.from_module`."
        )
    try:
        processor = _load(
            getattr(import_module(reader.place), reader.loader),
            model,
            f"no {reader.what}",
            trust_remote_code=trust_remote_code,
            **reader.options,
        )
    except ModelError as error:
        folder = Path(model)
        if folder.is_dir() and not any(path for name in reader.files for path in folder.glob(name)):
            raise _no_processor(model, reader) from error
        raise
    if reader is _TOKENIZER and _is_empty(processor):
        raise _no_processor(model, reader)
    return reader, processor


def _no_processor(model: str | Path, reader: _Reader) -> ModelError:
    place = "in the folder" if Path(model).is_dir() else "locally or on the hub for"
    return ModelError(
        f"There is no {reader.what} {place} {str(model)!r}; save the one that the model was trained with there, with "
        "its `save_pretrained`."
    )


def _is_empty(tokenizer: Any) -> bool:
    """Return whether there are special tokens only: what the library makes of a folder without a vocabulary."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return not set(tokenizer.get_vocab()) - special - set(tokenizer.all_special_tokens) - {"▁"}


def _settle_padding(module: nn.Module, tokenizer: Any) -> tuple[str, ...]:
    """Tell the module what padding is, where its configuration does not: decoders need it in batches."""
    config = text_config(module)
    token = padding_token(tokenizer, module)
    pad_id = tokenizer.convert_tokens_to_ids(token)
    if padding_id(module) == pad_id or not hasattr(config, "pad_token_id"):
        return ()
    before, config.pad_token_id = config.pad_token_id, pad_id
    seen = "names no padding token" if before is None else f"names token {before} as padding, which is none"
    return (f"the model's configuration {seen}; {token!r} ({pad_id}) is used",)


def _quantised_by(config: Any) -> str | None:
    """Return the method by which the weights are quantised, or None."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    settings = settings if isinstance(settings, Mapping) else vars(settings)
    method = settings.get("quant_method") or "bitsandbytes"  # the one that did not use to say its name
    return str(getattr(method, "value", method))


def _check_quantised(model: str | Path, module: nn.Module, method: str | None) -> None:
    if method is not None and getattr(module, "hf_quantizer", None) is None:
        raise _unknown_quantisation(model, method)


def _unknown_quantisation(model: str | Path, method: str) -> ModelError:
    return ModelError(
        f"{str(model)!r} is quantised by {method!r}, which transformers {transformers.__version__} does not know; give "
        "the model that it was made from."
    )


def _weight_notes(model: str | Path, module: nn.Module, quantised: str | None, dtype: str) -> tuple[str, ...]:
    if quantised is not None:
        return (f"the weights are quantised by {quantised} and run as the library loads them",)
    running = _listed({_name(p.dtype) for p in module.parameters() if p.is_floating_point()})
    config: Any = module.config
    stored = _listed(_stored_dtypes(model)) or _name(getattr(config, _DTYPE))
    if dtype == "auto":
        return (f"the weights run as {running}, as they are stored",)
    return (f"the weights are stored as {stored} and run as {running}",) if stored != running else ()


def _stored_dtypes(model: str | Path) -> set[str]:
    """Return the floating types in the headers of the weight files, or none if they are not found."""
    folder = Path(model)
    if not folder.is_dir():
        config = transformers.utils.cached_file(str(model), "config.json", local_files_only=True)
        folder = Path(config).parent
    whole = folder / "model.safetensors"
    found = set()
    for path in [whole] if whole.is_file() else folder.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            found |= {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return {_DTYPE_NAMES[code] for code in found if code in _DTYPE_NAMES}


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names))


def _left_out(module: nn.Module, info: Mapping[str, Any]) -> tuple[str, ...]:
    names = sorted(info["unexpected_keys"])
    if not names:
        return ()
    more = ", ..." if len(names) > 4 else ""
    return (
        f"{len(names)} weights of the checkpoint have no place in {type(module).__name__} and are left out "
        f"({', '.join(names[:4])}{more})",
    )


def _code_notes(config: Any, module: nn.Module, trust_remote_code: bool) -> tuple[str, ...]:
    if not getattr(config, "auto_map", None):
        return ()
    if trust_remote_code:
        return ("code of the model folder was run, as trust_remote_code allows",)
    return (f"the model folder has code of its own, which is not run; the library's {type(module).__name__} is used",)


def _own_code_refused(model: str | Path) -> ModelError:
    return ModelError(
        f"{str(model)!r} needs code of its own, which is not run unasked; read the code, and if you trust it pass "
        "`trust_remote_code=True`."
    )


def _load(loader: Any, model: str | Path, what: str, *, quantised: str | None = None, **options: Any) -> Any:
    place = "in the folder" if Path(model).is_dir() else "locally or on the hub for"
    try:
        return loader.from_pretrained(model, **options)
    except ImportError as error:
        seen = "needs a package that" if quantised is None else f"is quantised by {quantised!r}, and a package for it"
        raise ModelError(
            f"{str(model)!r} {seen} is not installed: {_reason(error)}. Install it, then try again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code=True" in str(error):
            raise _own_code_refused(model) from error
        if quantised is not None and "Unknown quantization type" in str(error):
            raise _unknown_quantisation(model, quantised) from error
        raise ModelError(f"There is {what} {place} {str(model)!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the model library's bars and loading report off the terminal; what they would say is raised as an error."""
    library = transformers.utils.logging
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
