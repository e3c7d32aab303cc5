"""Writes the tables of docs/attacks.md: the cheapest attack of each kind, and what to protect, on the demo's models.

python examples/cheapest_attacks.py --markdown docs/attacks.md
python examples/cheapest_attacks.py --tables protect --model path/to/model --train train.csv --test test.csv
"""

# ruff: noqa: T201
import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import synapse as syn
from synapse.attack.defence import defence_table, defend_head
from synapse.attack.families import FAMILIES
from synapse.data.examples import sample_examples
from synapse.demo.domains import domains
from synapse.demo.study import load_domain
from synapse.report.attacks import PROTECTION_COLUMNS, cheapest_attacks, markdown, protections
from synapse.report.run import open_run
from synapse.settings import make_settings
from synapse.study import run_study

BRIEF = {"fractions": (0.5, 1.0), "kinds": ("zero",), "methods": ("cumulative-mass",), "rank_draws": 0, "examples": 32}
"""What a study does besides attacking is of no matter here, so it does little of it."""


@dataclass(frozen=True)
class Subject:
    """What is to be attacked."""

    title: str
    classifier: syn.Classifier
    train: syn.Examples
    test: syn.Examples


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the tables that were asked for, print them, and write them where they were asked for."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    parts: dict[str, list[str]] = {name: [] for name in options.tables}
    for subject in _subjects(options):
        for name in options.tables:
            parts[name].append(f"### {subject.title}\n\n{TABLES[name](subject, options)}")
            print(parts[name][-1], flush=True)
    if options.markdown:
        for name, tables in parts.items():
            _write(options.markdown, name, "\n".join(tables))


def cheapest(subject: Subject, options: argparse.Namespace) -> str:
    """Return the table of the cheapest attack of each kind, and what it was measured on."""
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(
            attacks=tuple(options.attacks), attack_examples=options.examples, title=subject.title, **BRIEF
        )
        out = Path(folder) / "run"
        run = open_run(run_study(subject.classifier, subject.train, subject.test, settings=settings, out=out))
        clean, n = run.figure("clean", "accuracy"), f"{len(subject.test):,} test examples"
    few = f"Blocks and states were attacked on {options.examples} of them, so that shares there are coarse"
    return f"{n}, accuracy {clean.value:.3f}. {few}.\n\n{markdown(cheapest_attacks(run))}"


def protect(subject: Subject, options: argparse.Namespace) -> str:
    """Return the table of what to protect, with the study's sample of training examples and its order of features."""
    del options
    labels, n = subject.classifier.labels, make_settings().train_examples
    sample = subject.train.take(sample_examples(subject.train.targets(labels), n, seed=0))
    train, test = (syn.record(subject.classifier, split, component="pooler") for split in (sample, subject.test))
    order = syn.rank(train, method="cumulative-mass", probes=syn.fit_probes(train, seed=0)).order(0)
    found = defence_table(defend_head(subject.classifier, train, test, order))
    return markdown(protections(found), PROTECTION_COLUMNS)


TABLES: Mapping[str, Callable[[Subject, argparse.Namespace], str]] = {"attacks": cheapest, "protect": protect}
"""The tables, by the name that their place on the page has."""


def _subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """Yield everything that is to be attacked."""
    if options.model:
        classifier = syn.Classifier.from_pretrained(options.model)
        test = syn.read_examples(options.test)
        chosen = sample_examples(test.targets(classifier.labels), min(1000, len(test)), seed=0)
        yield Subject(options.title or classifier.name, classifier, syn.read_examples(options.train), test.take(chosen))
    if not options.model or options.markdown:
        for domain in domains():
            yield Subject(domain.title, load_domain(domain), domain.examples("train"), domain.examples("test"))


def _write(page: Path, name: str, tables: str) -> None:
    """Put tables between the page's two marks of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(f"{start}\n")
    _, after = rest.split(end)
    page.write_text(f"{before}{start}\n\n{tables}\n{end}{after}", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="folder or hub id of a classifier of your own")
    parser.add_argument("--train", help="its labelled training examples")
    parser.add_argument("--test", help="its labelled test examples, of which 1,000 are used")
    parser.add_argument("--title", help="what its tables are called")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES), help="what is made")
    parser.add_argument("--attacks", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), help="families")
    parser.add_argument("--examples", type=int, default=8, help="examples that the model is run on again and again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="page to write the tables into")
    return parser


if __name__ == "__main__":
    main()
