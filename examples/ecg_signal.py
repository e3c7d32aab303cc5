"""Train a small Transformer on heartbeats, then ask which of its neurons carry the diagnosis.

    python examples/ecg_signal.py FOLDER --out runs/ecg

FOLDER holds train.csv and test.csv with one heartbeat a row: columns t0, t1, ... and label. A heartbeat is cut into
patches of 10 points, which are the tokens; learned positions are added; the head reads the mean over all rows.
"""

# ruff: noqa: T201
import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor, nn

import synapse as syn

PATCH, WIDTH, INNER, HEADS, BLOCKS = 10, 32, 64, 4, 3
RATE, BATCH, SEED = 2e-3, 32, 0
QUICK = {"examples": 10, "train_examples": 80, "fractions": (0.5, 1.0), "kinds": ("zero",), "attack_examples": 2}


class HeartbeatTransformer(nn.Module):
    """From signals (example, time) to logits (example, label), by way of `nn.TransformerEncoder`."""

    def __init__(self, points: int, n_labels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(points // PATCH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=INNER, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=BLOCKS)
        self.head = nn.Linear(WIDTH, n_labels)

    def forward(self, signal: Tensor) -> Tensor:
        """Return the logits."""
        patches = signal.unflatten(1, (-1, PATCH))  # (example, row, point of the patch)
        rows = self.encoder(self.embed(patches) + self.positions)
        return self.head(rows.mean(dim=1))


def preprocess(signals: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Return the arguments of the forward pass for a batch of raw inputs."""
    return {"signal": torch.from_numpy(np.stack(signals))}


def fit(module: nn.Module, train: syn.Examples, labels: tuple[str, ...], epochs: int) -> None:
    """Train `module` in place; every beat is stretched in height and shaken a little each time it is seen."""
    signals, targets = preprocess(train.inputs)["signal"], torch.from_numpy(train.targets(labels))
    optimiser = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.05)
    steps = epochs * -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    module.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(train)).split(BATCH):
            beats = signals[rows] * (1 + 0.1 * torch.randn(len(rows), 1))
            logits = module(beats + 0.1 * torch.randn_like(beats))
            loss = nn.functional.cross_entropy(logits, targets[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        if (epoch + 1) % max(1, epochs // 5) == 0:
            print(f"  epoch {epoch + 1} of {epochs}: loss {total / len(train):.3f}")


def trained(folder: Path, train: syn.Examples, labels: tuple[str, ...], epochs: int) -> nn.Module:
    """Return the module that an earlier start left in `folder`, or train it and leave it there."""
    torch.manual_seed(SEED)
    module = HeartbeatTransformer(points=train.inputs.shape[1], n_labels=len(labels))
    sizes = {name: list(value.shape) for name, value in module.state_dict().items()}
    config = {"labels": list(labels), "epochs": epochs, "seed": SEED, "train": train.fingerprint, "sizes": sizes}
    weights, notes = folder / "model.safetensors", folder / "config.json"
    if weights.is_file() and notes.is_file() and json.loads(notes.read_text()) == config:
        print(f"Using the weights in {folder}.")
        module.load_state_dict(load_file(weights))
    else:
        print(f"Training on {len(train)} heartbeats.")
        fit(module, train, labels, epochs)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(module.state_dict(), weights)
        notes.write_text(json.dumps(config, indent=2) + "\n")
    return module.eval()


def main(arguments: Sequence[str] | None = None) -> Path:
    """Train, study, print what came out, and return the run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train.csv and test.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/ecg"), help="folder for the model and the run")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--quick", action="store_true", help="one epoch and a tiny study, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the sums, and so the weights, depend on the number of threads

    train, test = (syn.read_examples(options.data / f"{part}.csv", signal="t*") for part in ("train", "test"))
    labels = tuple(sorted(set(train.labels)))
    module = trained(options.out / "model", train, labels, 1 if options.quick else options.epochs)
    classifier = syn.Classifier.from_module(
        module, preprocess=preprocess, labels=labels, sample=train.inputs[:4], name="ecg-signal"
    )
    print("\nWhat was found in the module, and proved:")
    for name, value in classifier.describe().items():
        print(f"  {name}: {value}")

    amounts = QUICK if options.quick else {"examples": 100, "train_examples": "all"}
    settings = syn.make_settings(title="Heartbeats", overwrite=True, **amounts)
    run = syn.run_study(classifier, train, test, settings=settings, out=options.out / "run")

    targets, predicted = test.targets(labels), classifier.predict(test).argmax(axis=1)
    accuracy, largest = (predicted == targets).mean(), np.bincount(targets).max() / len(targets)
    print(f"\nTest accuracy {accuracy:.3f} (always naming the most frequent class: {largest:.3f}),")
    print(f"macro-F1 {f1_score(targets, predicted, average='macro'):.3f}, on {len(test)} examples")
    linear = LogisticRegression(max_iter=5000).fit(train.inputs, train.targets(labels)).predict(test.inputs)
    accuracy, f1 = (linear == targets).mean(), f1_score(targets, linear, average="macro")
    print(f"(a linear map of the points: {accuracy:.3f}, {f1:.3f})")
    cells = pd.read_parquet(run / "tables" / "sweep.parquet")
    whole = cells[(cells.kind == "zero") & (cells.fraction == 1)]
    print("Headroom: the accuracy lost when all units of a block are set to zero, by the rows where they are")
    print(whole.pivot_table(index="layer", columns="scope", values="drop", sort=False).round(2).to_string())
    print(*syn.summary_lines(run), f"Report: {run / 'report.html'}", sep="\n")
    return run


if __name__ == "__main__":
    main()
