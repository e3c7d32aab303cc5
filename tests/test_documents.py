"""What the documents promise exists: commands, options, links and Python names."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from architectures import TABLE
from planted import planted_classifier, planted_examples
from tiny_models import bert, word_tokenizer

import synapse
from synapse.cli.app import app
from synapse.ranking import METHODS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def commands_in(group: Any, before: str = "") -> dict[str, Any]:
    """Return the commands of a group and of the groups in it, by their names from the top."""
    found = {}
    for name, command in group.commands.items():
        inside = commands_in(command, f"{before}{name} ") if hasattr(command, "commands") else {before + name: command}
        found |= inside
    return found


COMMANDS = commands_in(typer.main.get_command(app))


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the name of the command in a line's words after `synapse`, and what follows it."""
    length = 1 if words[0] in COMMANDS else 2
    return " ".join(words[:length]), words[length:]


def shell_lines(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", path.read_text(), flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.removeprefix("$ ").strip() for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_synapse_command_in_a_document_exists_with_its_options(path):
    for line in shell_lines(path):
        words = shlex.split(line, comments=True)
        if not words or not words[0].endswith("synapse"):
            continue
        name, rest = command_of(words[1:])
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known | {"--help"}, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_in_a_document_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in shell_lines(path):
        words = shlex.split(line, comments=True)
        if words and words[0] == "make":
            assert set(words[1:]) <= targets, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_readme_shows_the_two_commands_first():
    assert shell_lines(ROOT / "README.md")[:2] == ["make demo", "make test"]


def test_the_public_names_are_those_listed():
    for name in synapse.__all__:
        assert getattr(synapse, name) is not None


def test_names_used_in_the_readme_are_public():
    used = set(re.findall(r"\bsyn\.(\w+)", (ROOT / "README.md").read_text()))
    assert used
    assert used <= set(synapse.__all__)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_of_every_command_shows_an_example_that_parses(command):
    text = COMMANDS[command].help or ""
    example = re.search(r"Example: `(synapse [^`]+)`", text)
    assert example, command
    name, rest = command_of(shlex.split(example[1])[1:])
    assert name == command
    with COMMANDS[command].make_context(command, rest, resilient_parsing=False):
        pass


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """On the demo's HTTP classifier, whose classes include the one that the example names."""
    import pandas as pd

    from synapse.demo.domains import domain

    requests = domain("cybersecurity")
    for split, n in (("train", 150), ("test", 20)):
        examples = requests.examples(split).take(range(0, 10 * n, 10) if split == "train" else range(0, 50 * n, 50))
        pd.DataFrame({"text": examples.inputs, "label": examples.labels}).to_csv(tmp_path / f"{split}.csv", index=False)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace("path/to/model", str(requests.folder)), names)
    assert names["logits"].shape == (20, 5)
    assert "headroom" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "docs/models.md", "CHANGELOG.md"])
def test_documents_count_the_architectures_of_the_table(name):
    understood = sum(row.refused is None for row in TABLE)
    assert re.findall(r"(\d+) kinds", (ROOT / name).read_text()) == [str(understood)]


def test_the_python_examples_of_the_page_of_models_run(capsys):
    """With a tiny model of the library and its tokenizer in memory, and with PyTorch's own encoder."""
    own = next(row for row in TABLE if row.name == "nn.TransformerEncoder")
    names = {"model": bert(), "tokenizer": word_tokenizer(), "module": own.build(), "preprocess": own.preprocess}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL):
        exec(code, names)
    assert names["classifier"].anatomy.blocks == own.block_names
    assert "'readout': 'first'" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["probes", "rankings"])
def test_the_python_examples_of_the_pages_of_probes_and_rankings_run(page):
    names: dict[str, object] = {
        "classifier": planted_classifier(),
        "train": planted_examples(90, seed=1),
        "test": planted_examples(30, seed=2),
    }
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.DOTALL):
        exec(code, names)


def test_the_page_of_rankings_lists_every_method():
    table = (ROOT / "docs" / "rankings.md").read_text().split("## The methods")[1].split("## ")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    }
    assert named == set(METHODS)


def test_the_python_example_of_the_page_on_recording_runs(tmp_path, monkeypatch):
    import pandas as pd

    from synapse.demo.domains import domain

    requests = domain("cybersecurity")
    examples = requests.examples("train").take(range(0, 600, 5))
    pd.DataFrame({"text": examples.inputs, "label": examples.labels}).to_csv(tmp_path / "train.csv", index=False)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recording.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/model", str(requests.folder)), names)
    assert names["layer"].shape == (120, names["classifier"].width)
    assert (names["some"] == names["layer"][[0, 3, 5]]).all()
    assert len(list((tmp_path / "recordings").glob("*/checksums.json"))) == 1
