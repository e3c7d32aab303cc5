"""Writes the tables of docs/attacks.md: the cheapest attack of each kind on the demo's models, or yours.

python examples/cheapest_attacks.py --markdown docs/attacks.md
python examples/cheapest_attacks.py --model path/to/model --train train.csv --test test.csv
"""

# ruff: noqa: T201
import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import synapse as syn
from synapse.attack.families import FAMILIES
from synapse.data.examples import sample_examples
from synapse.demo.domains import domains
from synapse.demo.study import load_domain
from synapse.report.attacks import cheapest_attacks, markdown
from synapse.report.run import open_run
from synapse.settings import make_settings
from synapse.study import run_study

BRIEF = {"fractions": (0.5, 1.0), "kinds": ("zero",), "methods": ("cumulative-mass",), "rank_draws": 0, "examples": 32}
"""What a study does besides attacking is of no matter here, so it does little of it."""


def main() -> None:
    """Attack what was asked for, print the tables, and write them where they were asked for."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    parts = []
    for title, classifier, train, test in _subjects(options):
        with tempfile.TemporaryDirectory() as folder:
            settings = make_settings(
                attacks=tuple(options.attacks), attack_examples=options.examples, title=title, **BRIEF
            )
            run = open_run(run_study(classifier, train, test, settings=settings, out=Path(folder) / "run"))
        clean = run.figure("clean", "accuracy")
        size = f"{len(test):,} test examples, accuracy {clean.value:.3f}" if clean else f"{len(test):,} test examples"
        parts.append(f"### {title}\n\n{size}.\n\n{markdown(cheapest_attacks(run))}")
        print(parts[-1], flush=True)
    if options.markdown:
        _write(options.markdown, "\n".join(parts))


def _subjects(options: argparse.Namespace) -> Iterator[tuple[str, syn.Classifier, syn.Examples, syn.Examples]]:
    """Yield the title, the classifier and both splits of everything that is to be attacked."""
    if options.model:
        classifier = syn.Classifier.from_pretrained(options.model)
        test = syn.read_examples(options.test)
        chosen = sample_examples(test.targets(classifier.labels), min(1000, len(test)), seed=0)
        yield options.title or classifier.name, classifier, syn.read_examples(options.train), test.take(chosen)
    if not options.model or options.markdown:
        for domain in domains():
            yield domain.title, load_domain(domain), domain.examples("train"), domain.examples("test")


def _write(page: Path, tables: str) -> None:
    """Put the tables between the page's two marks."""
    before, rest = page.read_text(encoding="utf-8").split("<!-- tables -->\n")
    _, after = rest.split("<!-- end of tables -->")
    page.write_text(f"{before}<!-- tables -->\n\n{tables}\n<!-- end of tables -->{after}", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="folder or hub id of a classifier of your own")
    parser.add_argument("--train", help="its labelled training examples")
    parser.add_argument("--test", help="its labelled test examples, of which 1,000 are used")
    parser.add_argument("--title", help="what its table is called")
    parser.add_argument("--attacks", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), help="families")
    parser.add_argument("--examples", type=int, default=8, help="examples that the model is run on again and again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="page to write the tables into")
    return parser


if __name__ == "__main__":
    main()
