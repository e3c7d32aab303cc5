"""Predicts what a study of a million rows and 24 layers costs on 8 workers; nothing of it is run.

python examples/scale-out/million_rows.py --rate 1000

The classifier has the shape of BERT-large and random weights: what a study costs does not depend on them. `--rate` is
what one worker reads in a second, to be measured where the workers are: `synapse plan` says it of the machine that it
runs on.
"""

# ruff: noqa: T201
import argparse
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import synapse as syn
from synapse.cli.terminal import show_plan
from synapse.forecasting import forecast
from synapse.settings import make_settings

TOKENS = 128
LABELS = ("benign", "phishing", "malware", "spam")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the predictions."""
    options = _parser().parse_args(arguments)
    classifier = _classifier(options.layers)
    n_train = options.rows * 4 // 5
    train, test = _rows(n_train, 0), _rows(options.rows - n_train, n_train)
    with tempfile.TemporaryDirectory() as cache:
        for swept in options.swept:
            settings = make_settings(train_examples="all", examples=swept, cache=cache, rank_draws=0)
            print(f"\n{len(train):,} training and {len(test):,} test rows, {swept:,} of them swept:")
            show_plan(forecast(classifier, train, test, settings), options.workers, 1 / options.rate)


def _classifier(n_layers: int) -> syn.Classifier:
    shape = {"hidden_size": 1024, "num_hidden_layers": n_layers, "num_attention_heads": 16, "intermediate_size": 4096}
    torch.manual_seed(0)
    module = BertForSequenceClassification(BertConfig(**shape, num_labels=len(LABELS))).eval()
    return syn.Classifier.from_module(module, preprocess=_token_ids, labels=LABELS, sample=np.arange(2), device="cpu")


def _token_ids(rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return `TOKENS` token ids a row, which need not be held for all rows."""
    ids = (torch.as_tensor(rows)[:, None] + torch.arange(TOKENS)) % 20_000 + 1000
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _rows(n: int, first: int) -> syn.Examples:
    return syn.Examples(np.arange(first, first + n), tuple(LABELS[i % len(LABELS)] for i in range(n)), "made-up rows")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1000.0, help="examples that one worker reads in a second")
    parser.add_argument("--swept", type=int, nargs="+", default=[1000, 10_000], help="test rows that are swept")
    return parser


if __name__ == "__main__":
    main()
