"""The three embedded domains: a trained Transformer classifier each, with the data it was trained and tested on.

```text
Domain
├── FolderDomain    its classifier is a folder of the model library, tokenizer included
└── ModuleDomain    its classifier is a module, with a function that prepares its inputs
```

Nothing is downloaded: the requests are generated, the tables come with scikit-learn, the weights with the package.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from synapse.data.examples import Examples
from synapse.demo import http_requests
from synapse.demo.http_requests import Split
from synapse.demo.tabular import TabularTransformer
from synapse.errors import SettingsError, near

CHECKPOINTS = Path(__file__).parent / "checkpoints"

SPLIT_SEED = 0
TEST_SHARE = 0.3
"""Of the two tables; their splits are stratified by class."""


@dataclass(frozen=True)
class Domain:
    """A field of application with labelled examples and a trained classifier."""

    name: str
    """`cybersecurity`, `healthcare` or `vision`; also the name of its checkpoint's folder."""
    title: str
    description: str
    """What is classified, by what, in a sentence or two."""
    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    read: Callable[[Split], tuple[tuple[str, ...] | np.ndarray, tuple[str, ...]]]
    """Inputs and labels of a split."""

    @property
    def folder(self) -> Path:
        """Where the trained weights, the configuration and `metrics.json` are."""
        return CHECKPOINTS / self.name

    def examples(self, split: str) -> Examples:
        """Return the labelled examples of `train` or `test`; the same ones at every call.

        Raises:
            SettingsError: `split` is neither `train` nor `test`.
        """
        if split not in ("train", "test"):
            raise SettingsError(f"No split {split!r} in a demo domain: use 'train' or 'test'.")
        inputs, labels = self.read("train" if split == "train" else "test")
        return Examples(inputs=inputs, labels=labels, name=f"{self.name}-{split}")


@dataclass(frozen=True)
class FolderDomain(Domain):
    """A domain whose `folder` the model library loads as it is: model, tokenizer and label names."""


@dataclass(frozen=True)
class ModuleDomain(Domain):
    """A domain whose classifier is a plain module."""

    load: Callable[[Path], nn.Module]
    """The trained module of the domain's folder."""
    preprocess: Callable[[np.ndarray], dict[str, Tensor]]
    """Keyword arguments of the module's forward pass, of a batch of inputs."""

    def module(self) -> nn.Module:
        """Return the trained module in evaluation mode, in float32; a new one at every call."""
        return self.load(self.folder).eval()


def domains() -> tuple[Domain, ...]:
    """Return the embedded domains: cybersecurity, healthcare, vision."""
    return (CYBERSECURITY, HEALTHCARE, VISION)


def domain(name: str) -> Domain:
    """Return the embedded domain of that name.

    Raises:
        SettingsError: there is none.
    """
    known = {each.name: each for each in domains()}
    if name not in known:
        raise SettingsError(f"No demo domain {name!r}: use one of {', '.join(known)}.{near(name, known)}")
    return known[name]


def _read_requests(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    requests = http_requests.generate(split)
    return tuple(r.text for r in requests), tuple(r.label for r in requests)


def _read_tumours(split: Split) -> tuple[Float[np.ndarray, "example 30"], tuple[str, ...]]:
    table = load_breast_cancer()
    return _part(table.data, [str(table.target_names[t]) for t in table.target], split)


def _read_digits(split: Split) -> tuple[Float[np.ndarray, "example 8 8"], tuple[str, ...]]:
    table = load_digits()
    return _part(table.images, [str(t) for t in table.target], split)


def _part(inputs: np.ndarray, labels: list[str], split: Split) -> tuple[np.ndarray, tuple[str, ...]]:
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    rows = train if split == "train" else test
    return inputs[rows].astype(np.float32), tuple(labels[i] for i in rows)


def _tumour_arguments(inputs: Float[np.ndarray, "example 30"]) -> dict[str, Tensor]:
    return {"features": torch.tensor(inputs, dtype=torch.float32)}


def _digit_arguments(inputs: Float[np.ndarray, "example 8 8"]) -> dict[str, Tensor]:
    """Return the images in one channel, their grey levels 0..16 brought to -1..1."""
    return {"pixel_values": torch.tensor(inputs, dtype=torch.float32).unsqueeze(1) / 8 - 1}


def _load_tabular(folder: Path) -> nn.Module:
    # On the meta device no weight is drawn, so the caller's random numbers stay as they are.
    with torch.device("meta"):
        module = TabularTransformer(**json.loads((folder / "config.json").read_text()))
    module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return module


def _load_vit(folder: Path) -> nn.Module:
    from transformers import ViTForImageClassification
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # Some versions of the library draw weights before they read them.
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = ViTForImageClassification.from_pretrained(folder, use_safetensors=True, dtype="float32")
    finally:
        if bars:
            logging.enable_progress_bar()
    return module


CYBERSECURITY = FolderDomain(
    name="cybersecurity",
    title="HTTP attacks",
    description="Generated HTTP requests, harmless or one of four kinds of attack, read by a small BERT.",
    labels=http_requests.LABELS,
    read=_read_requests,
)

HEALTHCARE = ModuleDomain(
    name="healthcare",
    title="Breast tumours",
    description="Thirty measurements of cell nuclei (Wisconsin diagnostic data), read by a Transformer for tables.",
    labels=("malignant", "benign"),
    read=_read_tumours,
    load=_load_tabular,
    preprocess=_tumour_arguments,
)

VISION = ModuleDomain(
    name="vision",
    title="Handwritten digits",
    description="Images of digits, 8 by 8 pixels, read by a small vision Transformer in patches of 2 by 2.",
    labels=tuple("0123456789"),
    read=_read_digits,
    load=_load_vit,
    preprocess=_digit_arguments,
)
