"""A run folder made by hand, in the format that studies write; no study is run."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

FRACTIONS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
CLEAN = 0.9
"""Accuracy of the made-up classifier."""
N = 200
"""Examples behind every number."""
UNUSED = {"value": None, "low": None, "high": None, "n": N, "unit": "", "note": "not used here"}


def figure(value: float, spread: float = 0.04, unit: str = "accuracy", n: int = N) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "n": n, "unit": unit}


SHARE = {"residual": 1.0, "mlp": 0.5, "attention": 0.4, "heads": 0.4, "pooler": 1.0}
"""Headroom of each component, as a share of that of the blocks' output."""


def headroom_of(scope: str, layer: int, n_layers: int, component: str = "residual") -> float:
    """The readout row is re-supplied before the last block; all rows are not."""
    return SHARE[component] * _headroom_of_blocks(scope, layer, n_layers)


def _headroom_of_blocks(scope: str, layer: int, n_layers: int) -> float:
    last = layer == n_layers - 1
    if scope == "all":
        return 0.6
    if scope == "readout-onward":
        return 0.55
    return 0.5 if last else 0.01


def build_run(
    path: Path,
    *,
    n_layers: int = 3,
    labels: Sequence[str] = ("ham", "spam", "<script>alert(1)</script>"),
    scopes: Sequence[str] = ("readout", "all"),
    methods: Sequence[str] = ("cumulative-mass",),
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 2,
    rank_draws: int = 0,
    title: str = "A <b>made-up</b> run",
    width: int = 64,
    components: Mapping[str, tuple[int, int]] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Path:
    """Return the folder, filled with a run in which blocks before the last one are re-supplied.

    `components` gives layers and units of each, the blocks' output alone unless given; `model` is added to what the
    manifest says of the model. Several methods are judged beside each other, as `_faithfulness` says. With
    `rank_draws` the first was ranked again on so many draws.
    """
    shapes = dict(components or {"residual": (n_layers, width)})
    (path / "tables").mkdir(parents=True)
    parts = [
        {
            "probe": _probe_table(n),
            "ranking": _ranking_table(n, labels, methods, units),
            **({"rank_stability": _rank_stability_table(n, labels, methods[0], units)} if rank_draws else {}),
            "sweep": _sweep_table(n, labels, scopes, methods, fractions, draws, units, component),
        }
        for component, (n, units) in shapes.items()
    ]
    tables = {}
    for name in parts[0]:
        for component, part in zip(shapes, parts, strict=True):
            part[name].insert(0, "component", component)
        tables[name] = pd.concat([part[name] for part in parts], ignore_index=True)
    tables["sweep"]["cell"] = range(len(tables["sweep"]))
    tables["attack"] = _attack_table(n_layers, labels)
    if len(methods) > 1:
        tables["agreement"] = pd.concat(
            [_agreement_table(n, labels, methods, component) for component, (n, _) in shapes.items()]
        )
    for name, table in tables.items():
        table.to_parquet(path / "tables" / f"{name}.parquet")
    first = next(iter(shapes))
    cards = {component: _scorecard(range(n), labels, scopes, component) for component, (n, _) in shapes.items()}
    if len(methods) > 1:
        for component, (n, _) in shapes.items():
            cards[component]["faithfulness"] = _faithfulness(range(n), methods, component)
    if rank_draws:
        for component, (n, _) in shapes.items():
            cards[component]["rank_stability"] = _rank_stability(range(n), labels, rank_draws)
    further = {
        component: {
            section: part for section, part in card.items() if section not in ("format", "clean", "vulnerability")
        }
        for component, card in cards.items()
        if component != first
    }
    _write_json(
        path / "scorecard.json", cards[first] | {"component": first} | ({"components": further} if further else {})
    )
    manifest = _manifest(*shapes[first], labels, title, len(tables["sweep"]))
    manifest["components"] = {name: {"n_layers": n, "width": units} for name, (n, units) in shapes.items()}
    manifest["model"] |= model or {}
    _write_json(path / "manifest.json", manifest)
    logits = zarr.open_group(path / "logits.zarr", mode="w", zarr_format=3)
    clean = np.zeros((4, len(labels)), np.float32)
    clean[:, 0] = [2.0, 4.0, 4.0, 6.0]  # median margin 4
    logits.create_array("clean", data=clean)
    return path


def as_before_components(path: Path) -> Path:
    """Take out of a run of the blocks' output what folders did not hold when that was all that was studied."""
    for name in ("probe", "ranking", "sweep"):
        table = path / "tables" / f"{name}.parquet"
        pd.read_parquet(table).drop(columns="component").to_parquet(table)
    change_json(path / "manifest.json", ["components"], ...)
    change_json(path / "scorecard.json", ["component"], ...)
    return path


def change_json(path: Path, keys: Sequence[str], value: Any) -> None:
    """Set one entry of a JSON file, or delete it where the value is `...`."""
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    if value is ...:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    _write_json(path, content)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _scorecard(layers: range, labels: Sequence[str], scopes: Sequence[str], component: str) -> dict[str, Any]:
    n_layers = len(layers)

    def lost(scope: str, layer: int) -> float:
        return headroom_of(scope, layer, n_layers, component)

    def used(scope: str, layer: int) -> bool:
        return lost(scope, layer) > 0.05

    def by_place(value: Any) -> dict[str, Any]:
        return {s: {str(k): (value if used(s, k) else UNUSED) for k in layers} for s in scopes}

    def arms(**values: dict[str, Any]) -> dict[str, Any]:
        return {
            s: {str(k): {arm: (f if used(s, k) else UNUSED) for arm, f in values.items()} for k in layers}
            for s in scopes
        }

    drops = {
        a: {
            b: figure(0.42 - 0.05 * i if a == b else 0.04 * ((i + j) % 3) - 0.03, unit="recall")
            for j, b in enumerate(labels)
        }
        for i, a in enumerate(labels)
    }
    shifts = {label: figure(2.0 + 0.7 * i, 0.2, "logit") for i, label in enumerate(labels)}
    edits = {
        a: {b: figure(0.1 + 0.07 * i + 0.03 * j, 0.01, "||dW||/||W||") for j, b in enumerate(labels) if a != b}
        for i, a in enumerate(labels)
    }
    randoms = {
        a: {
            b: (figure(1.4 + 0.1 * j, 0.1) if j % 2 else UNUSED | {"note": "not reached"})
            for j, b in enumerate(labels)
            if a != b
        }
        for a in labels
    }
    return {
        "format": 1,
        "clean": {
            "accuracy": figure(CLEAN, 0.02, n=1900),
            "macro_f1": figure(0.88, 0.02),
            "chance": figure(0.4, 0.0),
            "recall": {label: figure(0.95 - 0.05 * i, unit="recall", n=60) for i, label in enumerate(labels)},
        },
        "probe": {
            "accuracy": {str(k): figure(0.6 + 0.28 * (k + 1) / n_layers, 0.03) for k in layers},
            "macro_f1": {str(k): figure(0.6, 0.03) for k in layers},
            "control_accuracy": {str(k): figure(0.42 + 0.05 * k / n_layers, 0.03) for k in layers},
            "selectivity": {str(k): figure(0.18 + 0.23 * (k + 1) / n_layers, 0.04) for k in layers},
        },
        "stability": {
            "headroom": {s: {str(k): figure(lost(s, k)) for k in layers} for s in scopes},
            "resupply": {str(k): figure(0.1 if k == n_layers - 1 else 0.59) for k in layers},
            "commitment_depth": figure(1.0, 0.0, "depth"),
            "area": arms(top=figure(0.3), random=figure(0.2), bottom=figure(0.1)),
            "ordering_quality": by_place(figure(0.1, 0.03, "share of headroom")),
            "flip_rate": arms(top=figure(0.2), random=figure(0.1)),
            "kl": arms(top=figure(0.2), random=figure(0.1)),
        },
        "redundancy": {"removable": by_place(figure(0.25, 0.2)), "sufficient": by_place(figure(0.3))},
        "specialisation": {
            "overlap": {str(k): figure(0.5 - 0.3 * k / n_layers, 0.02, "Jaccard") for k in layers},
            "overlap_chance": {str(k): figure(0.05, 0.0, "Jaccard") for k in layers},
            "recall_drop": {
                s: {str(k): drops if used(s, k) else {a: dict.fromkeys(labels, UNUSED) for a in labels} for k in layers}
                for s in scopes
            },
            "specificity": by_place(figure(0.31, unit="recall")),
            "asymmetry": by_place(figure(0.05, unit="recall")),
        },
        "vulnerability": {
            "logit_shift": {"d50": shifts, "d95": shifts},
            "head_edit": {"d50": edits, "d95": edits},
            "head_edit_random": {"d50": randoms, "d95": randoms},
            "weight_noise": {"head": {"d50": figure(0.9), "d95": UNUSED}},
        },
    }


def quality_of(method: int, layer: int) -> float:
    """The second method is best, but for block 0, where the first is; a third one misleads."""
    return ((0.2, 0.1), (0.1, 0.3), (-0.2, -0.2))[method][min(layer, 1)]


def _faithfulness(layers: range, methods: Sequence[str], component: str) -> dict[str, Any]:
    def judged(qualities: Sequence[float]) -> tuple[dict[str, Any], dict[str, Any]]:
        first, second = sorted(range(len(methods)), key=lambda i: -qualities[i])[:2]
        lead = figure(qualities[first] - qualities[second], 0.05, "share of headroom")
        figures = {method: figure(q, 0.05, "share of headroom") for method, q in zip(methods, qualities, strict=True)}
        return figures, {"method": methods[first], "second": methods[second], "lead": lead}

    at = {str(k): judged([quality_of(i, k) for i in range(len(methods))]) for k in layers}
    overall, best = judged([float(np.mean([quality_of(i, k) for k in layers])) for i in range(len(methods))])
    return {
        "quality": {"all": {k: figures for k, (figures, _) in at.items()}},
        "best": {"all": {k: each for k, (_, each) in at.items()}},
        "overall": {"all": overall},
        "best_overall": {"all": best},
    }


def _rank_stability(layers: range, labels: Sequence[str], draws: int) -> dict[str, Any]:
    """Each block is more stable than the one before it, each class less than all, and ties hide half of that."""

    def index(value: float) -> dict[str, Any]:
        return figure(value, 0.03, "stability", draws)

    def of_class(more: float) -> dict[str, Any]:
        return {
            str(k): {label: index(0.3 + 0.1 * k + more - 0.05 * i) for i, label in enumerate(labels)} for k in layers
        }

    bare = {"low": None, "high": None, "n": draws}
    return {
        "kuncheva": {str(k): index(0.4 + 0.1 * k) for k in layers},
        "kuncheva_of_class": of_class(0.0),
        "nogueira": {str(k): index(0.7 + 0.1 * k) for k in layers},
        "nogueira_of_class": of_class(0.3),
        "settled": {str(k): bare | {"value": 2.0 + k, "unit": "units", "note": "of 6"} for k in layers},
        "noise": bare | {"value": 0.16, "unit": "stability", "note": "expected of units that are all noise"},
    }


def _rank_stability_table(n_layers: int, labels: Sequence[str], method: str, width: int) -> pd.DataFrame:
    ranking = _ranking_table(n_layers, labels, (method,), width).drop(columns="score")
    low, high = (ranking["rank"] - 2).clip(lower=0), ranking["rank"] + 3
    return ranking.assign(median=ranking["rank"], low=low, high=high, k=6, top_probability=0.5, draws=50)


def _agreement_table(n_layers: int, labels: Sequence[str], methods: Sequence[str], component: str) -> pd.DataFrame:
    rows = [
        (
            component,
            layer,
            label,
            *pair,
            6,
            0.3 - 0.1 * layer,
            0.4,
            0.1,
            0.2,
            0.05,
            0.03 + 0.02 * layer,
            0.04 + 0.02 * layer,
        )
        for layer, label, pair in product(range(n_layers), ("", *labels), combinations(methods, 2))
    ]
    columns = "component layer label method other k tau rbo rbo_chance jaccard jaccard_chance p p_adjusted"
    return pd.DataFrame(rows, columns=columns.split())


def _manifest(n_layers: int, width: int, labels: Sequence[str], title: str, cells: int) -> dict[str, Any]:
    digest = "sha256:9f2c41d07b6e55aa01c4d2f7e8b39a6c1d0e4f5a6b7c8d9e0f1a2b3c4d5e6f70"
    return {
        "format": 1,
        "status": "complete",
        "title": title,
        "command": "synapse study run.yaml",
        "created": "2026-01-02T03:04:05Z",
        "synapse_version": "0.1.0",
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "seed": 0,
        "settings": {"fractions": list(FRACTIONS), "draws": 10, "sweep": {"scopes": ["readout", "all"]}},
        "model": {
            "name": "made-up",
            "hash": digest,
            "blocks": "encoder.layer",
            "width": width,
            "readout": "first",
            "head": "classifier",
            "parameters": 1234567,
            "proofs": {"identity edit changes nothing": "bitwise", "weights after the study": digest},
        },
        "data": {
            "train": {"name": "train.csv", "hash": digest, "n": 5000},
            "test": {"name": "test.csv", "hash": digest, "n": 1900},
            "shared_inputs": 3,
        },
        "labels": list(labels),
        "n_layers": n_layers,
        "width": width,
        "sweep": {"examples": N, "cells": cells, "sampled": True},
        "timings": {"record": 3.21, "probe": 1.5, "sweep": 60.04, "total": 70.0},
    }


def _probe_table(n_layers: int) -> pd.DataFrame:
    rows = [
        (k, (k + 1) / n_layers, measure, 0.8, 0.77, 0.83, N, "accuracy")
        for k in range(n_layers)
        for measure in ("accuracy", "selectivity")
    ]
    return pd.DataFrame(rows, columns=["layer", "depth", "measure", "value", "low", "high", "n", "unit"])


def _ranking_table(n_layers: int, labels: Sequence[str], methods: Sequence[str], width: int) -> pd.DataFrame:
    rows = [
        (method, layer, label, rank, (rank * 7 + layer + 3 * len(label)) % width, 1.0 / (rank + 1))
        for method, layer, label, rank in product(methods, range(n_layers), ("", *labels), range(12))
    ]
    return pd.DataFrame(rows, columns=["method", "layer", "label", "rank", "unit", "score"])


def _sweep_table(
    n_layers: int,
    labels: Sequence[str],
    scopes: Sequence[str],
    methods: Sequence[str],
    fractions: Sequence[float],
    draws: int,
    width: int,
    component: str,
) -> pd.DataFrame:
    rows = []

    def add(
        layer: int,
        scope: str,
        method: str,
        label: str,
        selection: str,
        draw: int,
        share: float,
        drop: float,
        n: int,
    ) -> None:
        accuracy = CLEAN - drop
        cell = (layer, (layer + 1) / n_layers, scope, "zero", np.nan, method, label, selection, draw, share)
        numbers = (
            round(share * width),
            len(rows),
            n,
            accuracy,
            accuracy - 0.03,
            accuracy + 0.03,
            drop,
            drop - 0.03,
        )
        rows.append((*cell, *numbers, drop + 0.03, drop, drop))

    for layer, scope in product(range(n_layers), scopes):
        most = headroom_of(scope, layer, n_layers, component)
        for share in fractions:
            for method in methods:
                add(layer, scope, method, "", "top", -1, share, most * share**1.2, N)
                add(layer, scope, method, "", "bottom", -1, share, most * share**6, N)
            for label in labels:
                add(layer, scope, methods[0], label, "top", -1, share, most * share**2, N)
            for draw in range(draws):
                add(
                    layer,
                    scope,
                    "random",
                    "",
                    "random",
                    draw,
                    share,
                    most * share**3 + 0.01 * (draw - (draws - 1) / 2),
                    N // (draw + 1),
                )
        add(layer, scope, "", "", "top", -1, 1.0, most, N)
    columns = "layer depth scope kind strength method label selection draw fraction k cell n accuracy accuracy_low"
    columns += " accuracy_high drop drop_low drop_high flip_rate kl"
    return pd.DataFrame(rows, columns=columns.split())


def _attack_table(n_layers: int, labels: Sequence[str]) -> pd.DataFrame:
    rows = []
    for index, target in enumerate(labels):
        for budget in np.linspace(0, 8, 17):
            share = float(1 / (1 + np.exp(2.5 + index - 1.2 * budget)))
            for arm, value in (("attack", share), ("random", share / 4)):
                spread = (value - 0.02, value + 0.02, N)
                rows.append(("logit-shift", "logits", "", target, arm, "success", budget, "logit", value, *spread))
    for index, place in enumerate([*(f"block {k}" for k in range(n_layers)), "head"]):
        for budget in (0.01, 0.03, 0.1, 0.3, 1.0):
            value = float(0.6 * budget / (budget + 0.05 * (index + 1)))
            spread = (value - 0.02, value + 0.02, N)
            rows.append(("weight-noise", place, "", "", "random", "flip_rate", budget, "||dW||/||W||", value, *spread))
    columns = [
        "attack",
        "location",
        "source",
        "target",
        "arm",
        "measure",
        "budget",
        "budget_unit",
        "value",
        "low",
        "high",
        "n",
    ]
    return pd.DataFrame(rows, columns=columns)
