"""The command line on images, sounds and pairs of texts, with tiny random models that are saved and loaded."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from scipy.io import wavfile
from test_commands import QUICK, WORDS, call

NAMES = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def save(folder: Path, name: str, processor, **settings) -> Path:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    module = cls(cls.config_class(**NAMES, **settings)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def images(folder: Path) -> tuple[Path, list[str]]:
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    model = save(folder / "vit", "ViTForImageClassification", processor, image_size=16, patch_size=4, **SIZES)
    option = []
    for part, n in (("train", 40), ("test", 16)):
        rng = np.random.default_rng(n)
        names = [f"{part}{i}.png" for i in range(n)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(folder / name)
        option += write(folder, part, {"picture": names})
    return model, [*option, "--file", "picture"]


def sounds(folder: Path) -> tuple[Path, list[str]]:
    processor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16_000, return_attention_mask=True)
    model = save(
        folder / "wav2vec2",
        "Wav2Vec2ForSequenceClassification",
        processor,
        **SIZES,
        conv_dim=(8, 8),
        conv_kernel=(10, 4),
        conv_stride=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        classifier_proj_size=8,
    )
    option = []
    for part, n in (("train", 40), ("test", 16)):
        rng = np.random.default_rng(n)
        names = [f"{part}{i}.wav" for i in range(n)]
        for i, name in enumerate(names):
            samples = rng.integers(-9000, 9000, size=800 + 160 * (i % 3), dtype=np.int16)
            wavfile.write(folder / name, 16_000, samples)
        option += write(folder, part, {"sound": names})
    return model, [*option, "--file", "sound"]


def pairs(folder: Path) -> tuple[Path, list[str]]:
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    model = save(folder / "bert", "BertForSequenceClassification", tokenizer, vocab_size=100, **SIZES)
    option = []
    for part, n in (("train", 40), ("test", 16)):
        rng = np.random.default_rng(n)
        columns = {name: [" ".join(rng.choice(WORDS, size=5)) for _ in range(n)] for name in ("premise", "hypothesis")}
        option += write(folder, part, columns)
    return model, [*option, "--text", "premise", "--pair", "hypothesis"]


def write(folder: Path, part: str, columns: dict[str, list[str]]) -> list[str]:
    table = pd.DataFrame(columns)
    table.assign(label=["ab"[i % 2] for i in range(len(table))]).to_csv(folder / f"{part}.csv", index=False)
    return [f"--{part}", str(folder / f"{part}.csv")]


@pytest.mark.parametrize(
    ("kind", "readout", "pads"),
    [(images, "first", True), (sounds, "mean", False), (pairs, "first", True)],
    ids=["images", "sounds", "pairs"],
)
def test_other_inputs_than_texts_are_studied_at_several_sites(monkeypatch, tmp_path, kind, readout, pads):
    model, options = kind(tmp_path)
    sites = ["--sites", "mlp,residual"]
    assert call(monkeypatch, "run", model, *options, *sites, "--out", tmp_path / "run", *QUICK) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["model"]["readout"], manifest["model"]["pads"]) == (readout, pads)
    assert manifest["components"] == {
        "mlp": {"n_layers": 2, "width": 24},
        "residual": {"n_layers": 2, "width": 16},
    }
    tables = {name: pd.read_parquet(tmp_path / "run" / "tables" / f"{name}.parquet") for name in ("probe", "sweep")}
    assert all(set(table["component"]) == {"mlp", "residual"} for table in tables.values())
    card = json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert card["component"] == "mlp"
    assert set(card["components"]) == {"residual"}
    assert {path.name for path in (tmp_path / "run").glob("*.html")} == {"report.html", "report-residual.html"}


def test_a_site_that_is_not_there_is_refused_before_anything_is_computed(monkeypatch, tmp_path, capsys):
    model, options = pairs(tmp_path)
    assert call(monkeypatch, "run", model, *options, "--sites", "neurons", "--out", tmp_path / "run") == 1
    assert "there is no site 'neurons'; there are residual, mlp, attention, heads, pooler" in capsys.readouterr().err
    assert call(monkeypatch, "run", model, *options, "--readout", "middle", "--out", tmp_path / "run") == 1
    assert "The setting 'readout' is 'middle'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
