"""Writes a table of docs/attacks.md: how many flips of stored bits, anywhere in a model, redirect a class.

python examples/bit_search.py --model path/to/model --train train.csv --test test.csv --markdown docs/attacks.md
"""

# ruff: noqa: T201
import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import synapse as syn
from synapse.attack.bits import BitSearch, random_attacks
from synapse.attack.bits.aim import nearest_pairs
from synapse.attack.bits.found import BitAttack
from synapse.data.examples import sample_examples
from synapse.perturb.bits import FORMATS

COLUMNS = ("stored as", "flips", "redirected", "lost elsewhere", "as many at random", "lost then", "logits not finite")


@dataclass(frozen=True)
class Found:
    """What a search found, and random flips of equal number."""

    attack: BitAttack
    random: list[BitAttack]
    seconds: float

    def row(self) -> tuple[str, ...]:
        """Return the figures on examples that the flips were not fitted to; of random flips the most of any draw."""
        last = self.attack.scoring[-1]
        drawn = [one.scoring[-1] for one in self.random]
        return (
            self.attack.perturbation.number_format,
            str(len(self.attack.flips)),
            f"{last.redirected} of {last.attacked} ({last.success:.1%})",
            f"{last.lost} of {last.others} ({last.collateral:.1%})",
            f"{max(one.success for one in drawn):.1%}",
            f"{max(one.collateral for one in drawn):.1%}",
            str(last.nonfinite),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Search in every format, print the table, and write it where it was asked for."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    classifier = syn.Classifier.from_pretrained(options.model)
    train, test = (syn.read_examples(path) for path in (options.train, options.test))
    fitting, scoring = (
        split.take(sample_examples(split.targets(classifier.labels), min(n, len(split)), seed=options.seed))
        for split, n in ((train, options.fitting), (test, options.scoring))
    )
    source, target = _ends(classifier, fitting, options)
    rows = [_found(classifier, name, fitting, scoring, source, target, options).row() for name in options.formats]
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    head = f"{options.title or classifier.name}: {source} → {target}, fitted on {len(fitting)} examples."
    table = "\n".join([head, "", *lines])
    print(table)
    if options.markdown:
        before, rest = options.markdown.read_text(encoding="utf-8").split("<!-- bits -->\n")
        _, after = rest.split("<!-- end of bits -->")
        text = f"{before}<!-- bits -->\n\n{table}\n\n<!-- end of bits -->{after}"
        options.markdown.write_text(text, encoding="utf-8")


def _ends(classifier: syn.Classifier, fitting: syn.Examples, options: argparse.Namespace) -> tuple[str, str]:
    """Return the classes that were asked for, or the pair whose logits are nearest."""
    if options.source and options.target:
        return options.source, options.target
    source, target = nearest_pairs(syn.record(classifier, fitting))[0]
    return classifier.labels[source], classifier.labels[target]


def _found(
    classifier: syn.Classifier,
    number_format: str,
    fitting: syn.Examples,
    scoring: syn.Examples,
    source: str,
    target: str,
    options: argparse.Namespace,
) -> Found:
    started = time.perf_counter()
    search = BitSearch(number_format, share=options.share, bound=options.bound, most=options.most)
    attack = search.find(classifier, fitting, scoring, source=source, target=target)
    random = random_attacks(search, attack, classifier, scoring, seed=options.seed)
    found = Found(attack, random, time.perf_counter() - started)
    print(f"{' | '.join(found.row())} | {attack.stopped}, {found.seconds:.0f} s", flush=True)
    places = np.unique([flip.weight for flip in attack.flips], return_counts=True)
    print("\n".join(f"  {count} in {name}" for name, count in zip(*places, strict=True)), flush=True)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a classifier")
    parser.add_argument("--train", required=True, help="labelled examples to fit the flips to")
    parser.add_argument("--test", required=True, help="labelled examples to score them on")
    parser.add_argument("--title", help="what the model is called in the table")
    parser.add_argument("--source", help="class to redirect [with --target; else the pair with the nearest logits]")
    parser.add_argument("--target", help="class to redirect it to")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--fitting", type=int, default=512, help="training examples used")
    parser.add_argument("--scoring", type=int, default=1000, help="test examples used")
    parser.add_argument(
        "--share", type=float, default=0.97, help="of the fitting examples to redirect; others follow less"
    )
    parser.add_argument("--bound", type=float, default=0.01, help="of the others' right answers that may be lost")
    parser.add_argument("--most", type=int, default=100, help="flips at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="page to write the table into")
    return parser


if __name__ == "__main__":
    main()
