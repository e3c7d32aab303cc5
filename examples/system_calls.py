"""Train a small Transformer on traces of system calls, then ask which of its neurons tell the attacks apart.

    python examples/system_calls.py FOLDER --out runs/system-calls

FOLDER holds train.csv and test.csv with the columns text (the numbers of the calls, separated by blanks) and label.
Calls are tokens, cut at 128 (of equal ones in a row, one is kept); with each, the pair and the triple of calls that it
ends are embedded. A [CLS] token stands in front, padding is masked, and the head reads [CLS].
"""

# ruff: noqa: T201
import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

import synapse as syn

LONGEST, LARGEST_CALL = 128, 400
PAIRS, TRIPLES = 4096, 8192  # entries that all pairs and triples of calls share: which one gets which is arbitrary
PAD, CLS, UNKNOWN, FIRST = 0, 1, 2, 3  # token ids; call number n is FIRST + n
WIDTH, INNER, HEADS, BLOCKS = 64, 128, 4, 3
RATE, BATCH, SEED = 3e-3, 32, 0
QUICK = {"examples": 10, "train_examples": 80, "fractions": (0.5, 1.0), "kinds": ("zero",), "attack_examples": 2}


class CallTransformer(nn.Module):
    """From token ids (example, row) to logits (example, label), by way of `nn.TransformerEncoder`."""

    def __init__(self, n_labels: int) -> None:
        super().__init__()
        self.calls = nn.Embedding(FIRST + LARGEST_CALL + 1, WIDTH, padding_idx=PAD)
        self.pairs, self.triples = nn.Embedding(PAIRS, WIDTH), nn.Embedding(TRIPLES, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(1 + LONGEST, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=INNER, activation="gelu", batch_first=True)
        layer.self_attn.dropout = 0.0  # costs more time than it is worth here
        self.encoder = nn.TransformerEncoder(layer, num_layers=BLOCKS)
        self.head = nn.Linear(WIDTH, n_labels)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        """Return the logits; `padding` is true where a row only fills up the batch."""
        before, earlier = (nn.functional.pad(ids, (shift, 0))[:, :-shift] for shift in (1, 2))
        pairs, triples = 811 * before + ids, 811 * (811 * earlier + before) + ids
        rows = self.calls(ids) + self.pairs(pairs % PAIRS) + self.triples(triples % TRIPLES)
        states = self.encoder(rows + self.positions[: ids.shape[1]], src_key_padding_mask=padding)
        return self.head(states[:, 0])


class CallPreprocess:
    """Turns traces into padded token ids and the padding mask."""

    def __call__(self, traces: Sequence[str]) -> dict[str, Tensor]:
        """Return the arguments of the forward pass for a batch of raw inputs."""
        rows = [torch.tensor(self.encode(trace)) for trace in traces]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        return {"ids": ids, "padding": ids == PAD}

    def lengths(self, traces: Sequence[str]) -> np.ndarray:
        """Return how many rows each trace fills, so that traces of like length are batched together."""
        return np.array([len(self.encode(trace)) for trace in traces])

    @staticmethod
    def encode(trace: str) -> list[int]:
        """Return the token ids of one trace, [CLS] first."""
        calls = [int(call) for call, _ in groupby(trace.split())][:LONGEST]
        return [CLS, *(FIRST + call if call <= LARGEST_CALL else UNKNOWN for call in calls)]


def fit(module: nn.Module, train: syn.Examples, labels: tuple[str, ...], epochs: int) -> None:
    """Train `module` in place; a tenth of the calls is hidden each time, and rare classes weigh more."""
    every, targets = CallPreprocess()(train.inputs)["ids"], torch.from_numpy(train.targets(labels))
    lengths = (every != PAD).sum(dim=1)
    weights = torch.bincount(targets).float().pow(-0.25)
    optimiser = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.05)
    steps = epochs * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    module.train()
    for epoch in range(epochs):
        total, parts = 0.0, torch.randperm(len(train)).split(16 * BATCH)
        # In every part, examples of like length share a batch, so that little of it is padding.
        for rows in (rows for part in parts for rows in part[lengths[part].argsort()].split(BATCH)):
            ids = every[rows, : lengths[rows].max()]
            hidden = (torch.rand(ids.shape) < 0.1) & (ids >= FIRST)
            logits = module(ids.masked_fill(hidden, UNKNOWN), ids == PAD)
            loss = nn.functional.cross_entropy(logits, targets[rows], weight=weights, label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        if (epoch + 1) % max(1, epochs // 5) == 0:
            print(f"  epoch {epoch + 1} of {epochs}: loss {total / len(train):.3f}")


def trained(folder: Path, train: syn.Examples, labels: tuple[str, ...], epochs: int) -> nn.Module:
    """Return the module that an earlier start left in `folder`, or train it and leave it there."""
    torch.manual_seed(SEED)
    module = CallTransformer(n_labels=len(labels))
    sizes = {name: list(value.shape) for name, value in module.state_dict().items()}
    config = {"labels": list(labels), "epochs": epochs, "seed": SEED, "train": train.fingerprint, "sizes": sizes}
    weights, notes = folder / "model.safetensors", folder / "config.json"
    if weights.is_file() and notes.is_file() and json.loads(notes.read_text()) == config:
        print(f"Using the weights in {folder}.")
        module.load_state_dict(load_file(weights))
    else:
        print(f"Training on {len(train)} traces.")
        fit(module, train, labels, epochs)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(module.state_dict(), weights)
        notes.write_text(json.dumps(config, indent=2) + "\n")
    return module.eval()


def main(arguments: Sequence[str] | None = None) -> Path:
    """Train, study, print what came out, and return the run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train.csv and test.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/system-calls"), help="folder for the model and the run")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="one epoch and a tiny study, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the sums, and so the weights, depend on the number of threads

    train, test = (syn.read_examples(options.data / f"{part}.csv") for part in ("train", "test"))
    labels = tuple(sorted(set(train.labels)))
    module = trained(options.out / "model", train, labels, 1 if options.quick else options.epochs)
    order = CallPreprocess().lengths(train.inputs).argsort()
    sample = [train.inputs[row] for row in order[[0, 1, -2, -1]]]  # unequal lengths prove that padding is masked
    classifier = syn.Classifier.from_module(
        module, preprocess=CallPreprocess(), labels=labels, sample=sample, name="system-calls"
    )
    print("\nWhat was found in the module, and proved:")
    for name, value in classifier.describe().items():
        print(f"  {name}: {value}")

    amounts = QUICK if options.quick else {"examples": 100, "train_examples": "all"}
    settings = syn.make_settings(title="System calls", overwrite=True, **amounts)
    run = syn.run_study(classifier, train, test, settings=settings, out=options.out / "run")

    targets, predicted = test.targets(labels), classifier.predict(test).argmax(axis=1)
    accuracy, largest = (predicted == targets).mean(), np.bincount(targets).max() / len(targets)
    print(f"\nTest accuracy {accuracy:.3f} (always naming the most frequent class: {largest:.3f}),")
    print(f"macro-F1 {f1_score(targets, predicted, average='macro'):.3f}, on {len(test)} examples")
    counting = make_pipeline(
        TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 3), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=2000),
    ).fit(train.inputs, train.targets(labels))
    counted = counting.predict(test.inputs)
    accuracy, f1 = (counted == targets).mean(), f1_score(targets, counted, average="macro")
    print(f"(counting 1 to 3 calls: {accuracy:.3f}, {f1:.3f})")
    cells = pd.read_parquet(run / "tables" / "sweep.parquet")
    whole = cells[(cells.kind == "zero") & (cells.fraction == 1)]
    print("Headroom: the accuracy lost when all units of a block are set to zero, by the rows where they are")
    print(whole.pivot_table(index="layer", columns="scope", values="drop", sort=False).round(2).to_string())
    print(*syn.summary_lines(run), f"Report: {run / 'report.html'}", sep="\n")
    return run


if __name__ == "__main__":
    main()
