"""Train the embedded domains' classifiers again: `python -m synapse.demo.train [--only NAME] [--out DIR]`.

With one thread, the same processor and the same library versions, the weights come out bit for bit the same.
"""

import argparse
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from synapse.data.examples import Examples
from synapse.demo import http_requests
from synapse.demo.domains import CHECKPOINTS, CYBERSECURITY, HEALTHCARE, VISION, ModuleDomain, domains
from synapse.demo.tabular import TabularTransformer

log = logging.getLogger(__name__)

MAX_TOKENS = 96
VOCABULARY = 800


@dataclass(frozen=True)
class Recipe:
    """How a module is trained: AdamW, the rate rising over the first tenth, then falling as a cosine to zero."""

    epochs: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 0.05
    seed: int = 0


RECIPES = {
    "cybersecurity": Recipe(epochs=24, learning_rate=1e-3),
    "healthcare": Recipe(epochs=30, learning_rate=1e-3),
    "vision": Recipe(epochs=40, learning_rate=1e-3),
}

Batch = tuple[dict[str, Tensor], Tensor]
"""Keyword arguments of a forward pass, and the positions of the right labels."""


def train_cybersecurity(out: Path, recipe: Recipe = RECIPES["cybersecurity"]) -> dict[str, Any]:
    """Train the tokenizer and a small BERT, write them to `out`, and return the metrics on the test part.

    Each epoch sees newly generated requests with payloads of the train part; those of the first epoch are the
    domain's train examples.
    """
    from transformers import BertConfig, BertForSequenceClassification

    labels = CYBERSECURITY.labels
    tokenizer = request_tokenizer([r.text for r in http_requests.generate("train")])

    def arguments(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt"))

    def batches(epoch: int) -> list[Batch]:
        requests = http_requests.generate("train", seed=epoch)
        # Batches of about equal length: there is little to pad.
        by_length = sorted(requests, key=lambda r: len(tokenizer.encode(r.text, truncation=True)))
        parts = [by_length[i : i + recipe.batch_size] for i in range(0, len(by_length), recipe.batch_size)]
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(parts))
        return [
            (arguments([r.text for r in parts[i]]), torch.tensor([labels.index(r.label) for r in parts[i]]))
            for i in order
        ]

    with _seeded(recipe.seed):
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=MAX_TOKENS,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
            # No request comes twice, so nothing is memorised that dropout would have to prevent.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        module = BertForSequenceClassification(config)
        fit(module, batches, recipe)
    module.save_pretrained(out)
    _save_tokenizer(out, tokenizer)
    test = CYBERSECURITY.examples("test")
    parts = [[str(text) for text in test.inputs[i : i + 64]] for i in range(0, len(test), 64)]
    predicted = torch.cat([predict(module, arguments(part)) for part in parts])
    return _write_metrics(out, predicted, test, labels, recipe)


def train_healthcare(out: Path, recipe: Recipe = RECIPES["healthcare"]) -> dict[str, Any]:
    """Train the Transformer for tables, write it to `out`, and return the metrics on the test part."""
    features = np.asarray(HEALTHCARE.examples("train").inputs)
    config = {"n_features": 30, "n_labels": 2, "width": 32, "n_blocks": 3, "n_heads": 4}
    with _seeded(recipe.seed):
        module = TabularTransformer(**config, dropout=0.1)
        module.mean.copy_(torch.from_numpy(features.mean(axis=0)))
        module.deviation.copy_(torch.from_numpy(features.std(axis=0)))
        fit(module, _shuffled(HEALTHCARE, recipe), recipe)
    out.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return _test_module(out, module, HEALTHCARE, recipe)


def train_vision(out: Path, recipe: Recipe = RECIPES["vision"]) -> dict[str, Any]:
    """Train a small ViT, write it to `out`, and return the metrics on the test part."""
    from transformers import ViTConfig, ViTForImageClassification

    with _seeded(recipe.seed):
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=96,
            id2label=dict(enumerate(VISION.labels)),
            label2id={label: i for i, label in enumerate(VISION.labels)},
        )
        module = ViTForImageClassification(config)
        fit(module, _shuffled(VISION, recipe), recipe)
    module.save_pretrained(out)
    return _test_module(out, module, VISION, recipe)


TRAINERS = {"cybersecurity": train_cybersecurity, "healthcare": train_healthcare, "vision": train_vision}


def fit(module: nn.Module, batches: Callable[[int], list[Batch]], recipe: Recipe) -> None:
    """Train `module` in place on the batches of each epoch, and leave it in evaluation mode."""
    optimiser = torch.optim.AdamW(module.parameters(), weight_decay=recipe.weight_decay)
    module.train()
    for epoch in range(recipe.epochs):
        parts, total = batches(epoch), 0.0
        for i, (arguments, targets) in enumerate(parts):
            done = (epoch + (i + 1) / len(parts)) / recipe.epochs
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * min(done / 0.1, (1 + math.cos(math.pi * done)) / 2)
            optimiser.zero_grad()
            loss = cross_entropy(_logits(module, arguments), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            total += loss.item()
        log.info("epoch %d of %d: loss %.4f", epoch + 1, recipe.epochs, total / len(parts))
    module.eval()


@torch.no_grad()
def predict(module: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    """Return the position of the largest logit of each example."""
    return _logits(module, arguments).argmax(dim=-1)


def request_tokenizer(texts: Sequence[str]) -> Any:
    """Return a fast tokenizer fitted to `texts`: lower case, byte-level pairs, a percent code never split in two.

    Words, percent codes and digits are told apart first, so no pair joins them; no text is unknown to it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    words = Regex(r"%(?:25)*[0-9a-f]{2}|[a-z]+|[0-9]|[^a-z0-9]")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from `seed` inside, and leave the caller's as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _logits(module: nn.Module, arguments: dict[str, Tensor]) -> Float[Tensor, "example label"]:
    output = module(**arguments)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _shuffled(domain: ModuleDomain, recipe: Recipe) -> Callable[[int], list[Batch]]:
    """Return the batches of an epoch: the domain's train examples in random order."""
    train = domain.examples("train")
    inputs, targets = np.asarray(train.inputs), torch.from_numpy(train.targets(domain.labels))

    def batches(epoch: int) -> list[Batch]:
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(inputs))
        parts = [order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
        return [(domain.preprocess(inputs[rows]), targets[torch.from_numpy(rows)]) for rows in parts]

    return batches


def _test_module(out: Path, module: nn.Module, domain: ModuleDomain, recipe: Recipe) -> dict[str, Any]:
    test = domain.examples("test")
    predicted = predict(module, domain.preprocess(np.asarray(test.inputs)))
    return _write_metrics(out, predicted, test, domain.labels, recipe)


def _save_tokenizer(out: Path, tokenizer: Any) -> None:
    """Save a tokenizer under the class name that every supported version of the library knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_metrics(
    out: Path, predicted: Tensor, test: Examples, labels: tuple[str, ...], recipe: Recipe
) -> dict[str, Any]:
    targets = test.targets(labels)
    packages = ("torch", "transformers", "tokenizers", "safetensors", "scikit-learn", "numpy")
    metrics = {
        "accuracy": float(accuracy_score(targets, predicted.numpy())),
        "macro_f1": float(f1_score(targets, predicted.numpy(), average="macro")),
        "n": len(test),
        "seed": recipe.seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
    # The library lets only their owner read the weights; those of a package are for everyone.
    (out / "model.safetensors").chmod(0o644)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the domains asked for, on one thread, and log their test metrics."""
    from transformers.utils.logging import disable_progress_bar

    names = [domain.name for domain in domains()]
    parser = argparse.ArgumentParser(prog="python -m synapse.demo.train", description=__doc__)
    parser.add_argument("--only", choices=names, help="train this domain alone")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder to write NAME/ to (the package's own)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    torch.set_num_threads(1)
    for name in [options.only] if options.only else names:
        start = time.perf_counter()
        metrics = TRAINERS[name](options.out / name)
        log.info(
            "%s: accuracy %.4f, macro-F1 %.4f on %d examples; trained in %.0f s",
            *(name, metrics["accuracy"], metrics["macro_f1"], metrics["n"], time.perf_counter() - start),
        )


if __name__ == "__main__":
    main()
