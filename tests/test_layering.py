"""Values flow one way: an import may only point to a room that stands earlier in this list of what each may know."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

SOURCE = Path(__file__).parents[1] / "src" / "synapse"

# room -> the rooms that it may import
ALLOWED = {
    "errors": set(),
    "moments": set(),
    "stored": {"errors"},
    "integrity": set(),
    "elsewhere": {"errors", "integrity"},
    "execute": {"errors"},
    "types": {"errors", "moments", "stored"},
    "data": {"errors", "types", "elsewhere"},
    "model": {"errors", "types", "data"},
    "recording": {"errors", "types", "data", "execute", "model", "moments", "stored", "integrity"},
    "exchange": {"errors", "types", "moments", "data"},
    "probe": {"errors", "types", "data", "execute"},
    "ranking": {"errors", "types", "data", "execute", "model", "probe", "measure"},
    "perturb": {"errors", "types", "model"},
    "attack": {"errors", "types", "data", "execute", "model", "perturb", "integrity", "recording"},
    "sweeping": {"errors", "types", "data", "execute", "model", "perturb", "ranking", "measure"},
    "measure": {"errors", "types"},
    "store": {"errors", "types", "integrity", "elsewhere"},
    "report": {"errors", "types", "elsewhere"},
    "settings": {"errors", "types", "data", "execute", "attack", "ranking", "sweeping", "elsewhere"},
    "forecasting": {
        *("errors", "types", "data", "model", "recording", "ranking", "sweeping", "attack", "settings", "perturb"),
    },
    "study": {
        *("errors", "types", "data", "execute", "model", "recording", "probe", "ranking", "sweeping", "attack"),
        *("measure", "store", "report", "settings", "forecasting", "perturb", "elsewhere"),
    },
    "demo": {"errors", "types", "data", "execute", "model", "settings", "study"},
    "edits": {"errors", "types", "data", "model", "perturb", "ranking", "recording", "report", "sweeping"},
    "whatif": {"errors", "types", "data", "model", "perturb", "ranking", "measure", "edits"},
    "testing": {"errors", "types", "data", "execute", "model", "perturb", "probe", "ranking"},
    "cli": {
        *("errors", "data", "model", "recording", "settings", "study", "demo", "report", "store", "edits", "whatif"),
        *("integrity", "attack", "forecasting", "elsewhere"),
    },
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_never_run_back_up(path):
    room = room_of(path)
    own = {name.split(".")[1] for name in imported_modules(path) if name.startswith("synapse.")}
    assert own - {room} <= ALLOWED[room]


@pytest.mark.parametrize("room", ["measure", "report", "store", "data", "elsewhere"])
def test_what_reads_files_and_arrays_needs_no_torch(room):
    files = [path for path in FILES if room_of(path) == room]
    assert files
    for path in files:
        assert not {name for name in imported_modules(path) if name.split(".")[0] in ("torch", "transformers")}


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in FILES} == set(ALLOWED)


def test_only_the_command_line_writes_to_the_terminal():
    for path in FILES:
        if room_of(path) != "cli":
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_nothing_is_pickled():
    for path in FILES:
        assert not {name for name in imported_modules(path) if name.split(".")[0] in ("pickle", "joblib", "dill")}, path


def conditions(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Compare):
            yield node
        elif isinstance(node, ast.match_case):
            yield from (part for part in ast.walk(node.pattern) if isinstance(part, ast.expr))


def test_no_condition_asks_for_the_name_of_an_architecture():
    known = {name.casefold() for name in (*CONFIG_MAPPING_NAMES, *CONFIG_MAPPING_NAMES.values())}
    found = {
        (path.name, constant.value)
        for path in FILES
        for condition in conditions(ast.parse(path.read_text()))
        for constant in ast.walk(condition)
        if isinstance(constant, ast.Constant) and str(constant.value).casefold() in known
    }
    assert {"bert", "bertconfig", "llama"} <= known
    assert found == set()
