"""The workloads of the sweep benchmark: a classifier, its examples, and the cells that every side runs."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from peers.base import Task, TaskBatch
from torch import Tensor, nn

import synapse as syn
from synapse.ranking import Ranking
from synapse.sweeping import Cell, Kind
from synapse.types import Activations, Neurons

SHARED = Path(__file__).parents[2] / "shared"
"""Where a folder of real models and data may lie: beside the repository."""

SIZES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""The eight set sizes, as shares of the width."""

NEWS_LENGTHS = (72, 69, 64, 62, 59, 58, 56, 55, 54, 53, 51, 50, 49, 48, 47, 46, 44, 43, 42, 40, 38, 36, 33, 28)
"""Token counts of AG News for want of its texts: quantiles of its test part with BERT's word pieces, cut at 72."""

LABELS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Scale:
    """Sizes of a model with random weights."""

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int = 30522


MINILM = Scale(6, 384, 12, 1536)
BERT_BASE = Scale(12, 768, 12, 3072)
DECODER_6 = Scale(6, 384, 6, 1024, 32000)
DECODER_24 = Scale(24, 256, 4, 688, 32000)
DECODER_1B = Scale(16, 2048, 32, 8192, 32000)
VIT_BASE = Scale(12, 768, 12, 3072)

SPREAD = 0.05
"""Standard deviation of random weights: the library's 0.02 leaves the logits so flat that no edit would show."""


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Token ids padded on the right; `longest` is the length of the longest sample."""

    padding: int
    longest: int

    def __call__(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Return the ids and the mask of what is no padding."""
        rows = [torch.as_tensor(np.asarray(row, dtype=np.int64)) for row in inputs]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        n_tokens = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < n_tokens[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}

    def lengths(self, inputs: Sequence[Any]) -> np.ndarray:
        """Return the number of tokens of every input."""
        return np.array([len(row) for row in inputs], dtype=np.int64)

    def samples(self) -> Sequence[tuple[int, ...]]:
        """Return ids of unequal length, on which the anatomy is proved."""
        return [tuple(range(5, 5 + length)) for length in (self.longest, self.longest // 2, 5)]


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images that are arrays of floats already."""

    size: int
    dtype: torch.dtype

    def __call__(self, inputs: Sequence[Any]) -> Mapping[str, Tensor]:
        """Return the pixel values."""
        return {"pixel_values": torch.from_numpy(np.stack(list(inputs))).to(self.dtype)}

    def samples(self) -> np.ndarray:
        """Return images on which the anatomy is proved."""
        return random_pixels(3, self.size, seed=1)


@dataclass(frozen=True, eq=False)
class Setting:
    """A classifier and the examples it is measured on, and in words what they are."""

    classifier: syn.Classifier
    examples: syn.Examples
    description: str


@dataclass(frozen=True, eq=False)
class Built:
    """A workload that is ready to run: the task of all sides, and what only synapse needs beside it."""

    setting: Setting
    task: Task
    ranking: Ranking
    reference: Activations


@dataclass(frozen=True)
class Place:
    """Where a workload is built, and in which precision its weights run."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False


@dataclass(frozen=True)
class Workload:
    """A model and a plan of cells.

    `single` asks for every neuron of a layer alone instead of sets of `sizes`; with `draws` there are that many random
    sets of each size too, as a study has them. `examples` is how many there are, and how many with `--quick`.
    """

    name: str
    setting: Callable[[Place, int], Setting]
    layers: Literal["all", "last two", "middle", "last"]
    examples: tuple[int, int]
    sizes: tuple[float, ...] = SIZES
    draws: int = 0
    single: bool = False
    needs_gpu: bool = False

    def build(self, place: Place) -> Built:
        """Return the workload, ready to run."""
        setting = self.setting(place, self.examples[1 if place.quick else 0])
        classifier = setting.classifier
        every = range(classifier.n_layers)
        layers = {"all": every, "last two": every[-2:], "middle": every[len(every) // 2 - 1 :][:1], "last": every[-1:]}
        scores = np.random.default_rng(5).random((classifier.n_layers, 1 + len(classifier.labels), classifier.width))
        ranking = Ranking("order drawn at random", scores, classifier.labels, "no examples")
        cells = self._cells(ranking, layers[self.layers], classifier.width)
        return Built(setting, task_of(setting, cells), ranking, syn.record(classifier, setting.examples))

    def _cells(self, ranking: Ranking, layers: Sequence[int], width: int) -> list[Cell]:
        if self.single:
            sets = [Neurons(layer, (unit,)) for layer in layers for unit in range(width)]
        else:
            sets = [
                neurons
                for layer in layers
                for size in self.sizes
                for neurons in (
                    ranking.top(size, layer=layer),
                    *(ranking.random(size, layer=layer, seed=draw) for draw in range(self.draws)),
                )
            ]
        return [
            Cell(neurons, "readout", Kind("zero"), ranking.method, "", "top", -1, len(neurons) / width)
            for neurons in sets
        ]


def task_of(setting: Setting, cells: Sequence[Cell]) -> Task:
    """Return what every side runs: the batches that the sweep makes, and the cells."""
    classifier = setting.classifier
    batches = []
    for batch in classifier.batches(setting.examples.inputs):
        inputs = dict(batch.inputs)
        index = torch.from_numpy(np.asarray(batch.index)).to(classifier.device)
        batches.append(TaskBatch(index, inputs, readout_rows(classifier, inputs), n_tokens(classifier, inputs)))
    return Task(
        classifier.module,
        classifier.anatomy.blocks,
        tuple(batches),
        tuple((cell.neurons.layer, cell.neurons.units) for cell in cells),
        len(classifier.labels),
        setting.examples,
        tuple(cells),
    )


def readout_rows(classifier: syn.Classifier, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the row that the head reads, of every example: the first, or the last that is no padding."""
    first = next(iter(inputs.values()))
    if classifier.anatomy.readout == "first":
        return torch.zeros(len(first), dtype=torch.int64, device=first.device)
    if classifier.anatomy.readout == "last":
        return inputs["attention_mask"].sum(dim=1) - 1
    raise ValueError(f"The benchmark edits one row an example; this head reads {classifier.anatomy.readout!r}.")


def n_tokens(classifier: syn.Classifier, inputs: Mapping[str, Tensor]) -> int:
    """Return the number of rows that the first block returns."""
    seen: list[int] = []
    handle = classifier.blocks[0].register_forward_hook(partial(_take_length, seen))
    with torch.inference_mode():
        classifier.module(**{name: value[:1] for name, value in inputs.items()})
    handle.remove()
    return seen[0]


def _take_length(seen: list[int], _module: nn.Module, _arguments: Any, output: Any) -> None:
    seen.append((output[0] if isinstance(output, tuple) else output).shape[1])


def minilm(place: Place, n: int) -> Setting:
    """Return the fine-tuned MiniLM where it lies beside the repository, else a random model of its shape."""
    folder = SHARED / "models" / "minilm-agnews"
    if place.quick or not (folder / "model.safetensors").is_file():
        return encoder(MINILM, place, n)
    classifier = syn.Classifier.from_pretrained(folder, device=place.device)
    classifier.module.to(place.dtype)
    texts, labels = news_texts(n)
    words = f"MiniLM fine-tuned on AG News (6 x 384), {n} of its texts"
    return Setting(classifier, syn.Examples(texts, labels, "AG News"), words)


def encoder(scale: Scale, place: Place, n: int) -> Setting:
    """Return a BERT with random weights, on texts of AG News where they are, else on token ids of their lengths."""
    scale = Scale(3, 64, 4, 128, 2000) if place.quick else scale
    config = transformers.BertConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        intermediate_size=scale.inner,
        pad_token_id=0,
        **_common(),
    )
    module = _module(transformers.BertForSequenceClassification, config, place)
    folder = SHARED / "models" / "minilm-agnews"
    if not place.quick and (folder / "tokenizer.json").is_file():
        preprocess: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        inputs, words = news_texts(n)[0], f"{n} texts of AG News"
    else:
        lengths = [NEWS_LENGTHS[i * len(NEWS_LENGTHS) // n % len(NEWS_LENGTHS)] for i in range(n)]
        preprocess, inputs = TokenIds(0, 72), random_ids(lengths, scale.vocabulary, seed=3)
        words = f"{n} inputs of random tokens, as long as texts of AG News"
    classifier = syn.Classifier.from_module(module, preprocess=preprocess, labels=LABELS, device=place.device)
    shape = f"BERT with random weights ({scale.layers} x {scale.width})"
    return Setting(classifier, syn.Examples(inputs, _some_labels(n), "benchmark"), f"{shape}, {words}")


def decoder(scale: Scale, place: Place, n: int) -> Setting:
    """Return a Llama classifier with random weights, which reads the last token, on 128 random tokens."""
    scale = Scale(min(scale.layers, 4), 64, 4, 128, 2000) if place.quick else scale
    length = 32 if place.quick else 128
    config = transformers.LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        intermediate_size=scale.inner,
        max_position_embeddings=256,
        pad_token_id=0,
        use_cache=False,
        **_common(),
    )
    module = _module(transformers.LlamaForSequenceClassification, config, place)
    classifier = syn.Classifier.from_module(module, preprocess=TokenIds(0, length), labels=LABELS, device=place.device)
    inputs = random_ids([length] * n, scale.vocabulary, seed=3)
    words = f"Llama classifier with random weights ({scale.layers} x {scale.width}), {n} inputs of {length} tokens"
    return Setting(classifier, syn.Examples(inputs, _some_labels(n), "benchmark"), words)


def vision(scale: Scale, place: Place, n: int) -> Setting:
    """Return a ViT with random weights on random pixels."""
    scale = Scale(3, 64, 4, 128) if place.quick else scale
    size = 64 if place.quick else 224
    config = transformers.ViTConfig(
        hidden_size=scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        intermediate_size=scale.inner,
        image_size=size,
        patch_size=16,
        **_common(),
    )
    module = _module(transformers.ViTForImageClassification, config, place)
    classifier = syn.Classifier.from_module(
        module, preprocess=Pixels(size, place.dtype), labels=LABELS, device=place.device
    )
    inputs = random_pixels(n, size, seed=3)
    words = f"ViT with random weights ({scale.layers} x {scale.width}), {n} images of {size} x {size}"
    return Setting(classifier, syn.Examples(inputs, _some_labels(n), "benchmark"), words)


def news_texts(n: int, part: str = "test") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return texts of AG News spread over one of its parts, and their labels."""
    with (SHARED / "data" / "ag_news" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = [rows[i * len(rows) // n] for i in range(n)]
    return tuple(row["text"] for row in chosen), tuple(row["label"] for row in chosen)


def random_ids(lengths: Sequence[int], vocabulary: int, *, seed: int) -> tuple[tuple[int, ...], ...]:
    """Return rows of token ids, none of which is the padding's."""
    random = np.random.default_rng(seed)
    return tuple(tuple(int(token) for token in random.integers(5, vocabulary, length)) for length in lengths)


def random_pixels(n: int, size: int, *, seed: int) -> np.ndarray:
    """Return images of normal noise, (image, channel, row, column), in float32."""
    return np.random.default_rng(seed).normal(size=(n, 3, size, size)).astype(np.float32)


def _common() -> dict[str, Any]:
    return {"initializer_range": SPREAD, "id2label": dict(enumerate(LABELS))}


def _module(kind: Any, config: Any, place: Place) -> nn.Module:
    torch.manual_seed(7)
    return kind(config).to(place.dtype).eval()


def _some_labels(n: int) -> tuple[str, ...]:
    return tuple(LABELS[i % len(LABELS)] for i in range(n))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("encoder-minilm", minilm, "all", (48, 4)),
        Workload("encoder-bert-base", partial(encoder, BERT_BASE), "all", (24, 4)),
        Workload("encoder-last-two", minilm, "last two", (8, 4), draws=10),
        Workload("decoder-6", partial(decoder, DECODER_6), "all", (16, 2)),
        Workload("decoder-24", partial(decoder, DECODER_24), "all", (8, 2)),
        Workload("decoder-1b", partial(decoder, DECODER_1B), "all", (32, 2), sizes=(0.1, 0.9), needs_gpu=True),
        Workload("vision-vit-base", partial(vision, VIT_BASE), "all", (4, 2), sizes=(0.1, 0.9)),
        Workload("single-neuron-middle", minilm, "middle", (4, 2), single=True),
        Workload("single-neuron-last", minilm, "last", (4, 2), single=True),
    )
}
