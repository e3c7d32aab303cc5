"""Load a fine-tuned sequence classifier of the model library, and refuse what is none."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from jaxtyping import Int
from torch import Tensor, nn

from synapse.errors import ModelError, near


@dataclass(frozen=True, eq=False)
class TextPreprocess:
    """Tokenises texts, pads to the longest of the batch and cuts at `max_length` tokens."""

    tokenizer: Any
    max_length: int

    def __call__(self, inputs: Sequence[str]) -> Mapping[str, Tensor]:
        """Return token ids and masks, (example, token)."""
        return dict(self._encode(inputs, padding=True, return_tensors="pt"))

    def lengths(self, inputs: Sequence[str]) -> Int[np.ndarray, "example"]:
        """Return the number of tokens of every text."""
        return np.array([len(ids) for ids in self._encode(inputs)["input_ids"]], dtype=np.int64)

    def _encode(self, inputs: Sequence[str], **options: Any) -> Any:
        return self.tokenizer(list(inputs), truncation=True, max_length=self.max_length, **options)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """What a model folder holds: the module in evaluation mode, its text preprocessing, its class names."""

    module: nn.Module
    preprocess: TextPreprocess
    labels: tuple[str, ...]


def load_text_classifier(model: str | Path, *, max_length: int | None = None) -> LoadedModel:
    """Return the text classifier of a local folder or a hub id, in float32.

    Raises:
        ModelError: nothing there, not loadable, no classification head among the weights, a regression or multi-label
            head, or no tokenizer.
    """
    _check_folder(model)
    with _quiet_library():
        config = _load(transformers.AutoConfig, model, "no readable config.json of a Transformer")
        if getattr(config, "problem_type", None) in {"regression", "multi_label_classification"}:
            raise ModelError(
                f"{str(model)!r} is a {config.problem_type.replace('_', ' ')} model; a single-label classifier (one "
                "class for each example) was expected."
            )
        module, info = _load(
            transformers.AutoModelForSequenceClassification,
            model,
            "no sequence classifier in safetensors",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32",
        )
        tokenizer = _load(transformers.AutoTokenizer, model, "no tokenizer")
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise ModelError(
            f"{str(model)!r} has no classification head: the weights {missing} are not in the checkpoint"
            f"{_architectures(config)}. Fine-tune it for sequence classification first, then give its folder."
        )
    if module.config.num_labels < 2:
        raise ModelError(
            f"{str(model)!r} has one output, so it is a regression model; two or more classes were expected."
        )
    labels = tuple(str(module.config.id2label[i]) for i in range(module.config.num_labels))
    return LoadedModel(
        module.eval(), TextPreprocess(tokenizer, _max_length(config, module, tokenizer, max_length)), labels
    )


def _check_folder(model: str | Path) -> None:
    """Refuse paths that cannot be model folders, before the library looks for them on the hub."""
    path = Path(model)
    looks_local = isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~"))
    if path.is_file():
        raise ModelError(f"{str(model)!r} is a file; the folder with config.json and model.safetensors was expected.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            f"The folder {str(model)!r} is no model: it has no config.json. Give one that `save_pretrained` wrote."
        )
    if not path.exists() and (looks_local or str(model).count("/") > 1):
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise ModelError(f"There is no model folder {str(model)!r}.{near(path.name, names)}")


def _load(loader: Any, model: str | Path, what: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(model, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = "in the folder" if Path(model).is_dir() else "locally or on the hub for"
        raise ModelError(f"There is {what} {place} {str(model)!r}: {reason}") from error


def _architectures(config: Any) -> str:
    names = getattr(config, "architectures", None)
    return f" (it was saved as {', '.join(names)})" if names else ""


def _max_length(config: Any, module: nn.Module, tokenizer: Any, asked: int | None) -> int:
    limits = [tokenizer.model_max_length, _positions(config, module), asked]
    # Tokenizers without a limit say 1e30; where nothing limits a text, 512 tokens keep it affordable.
    return int(min((limit for limit in limits if limit is not None and limit < 1_000_000), default=512))


def _positions(config: Any, module: nn.Module) -> int | None:
    """Return how many positions the model has room for; an embedding with a padding index begins behind that index."""
    declared = getattr(config, "max_position_embeddings", None)
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.num_embeddings == declared and part.padding_idx is not None:
            return int(declared) - part.padding_idx - 1
    return declared


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
