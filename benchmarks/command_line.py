"""The command line of a benchmark script: what it can be asked for, and where its figures go."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from results import Result, problems, text_table, with_table


@dataclass(frozen=True)
class Script:
    """A benchmark: its workloads, the peers that it knows, and how its results are read and shown.

    `mark` is what stands around its table in docs/benchmarks.md.
    """

    description: str
    workloads: Mapping[str, Any]
    peers: Sequence[str]
    mark: str
    kind: type[Result]
    table: Callable[[Sequence[Any]], str]

    def parser(self) -> argparse.ArgumentParser:
        """Return the command line."""
        made = argparse.ArgumentParser(description=self.description)
        made.add_argument("--quick", action="store_true", help="small tasks of the same kinds: does everything work?")
        made.add_argument(
            "--workloads", type=partial(names_of, tuple(self.workloads)), help="by name or its beginning, with commas"
        )
        made.add_argument("--threads", type=int, default=1, help="threads of every side (default 1)")
        made.add_argument("--repeats", type=int, help="rounds of all sides (default 3; 2 with --quick)")
        made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
        made.add_argument("--markdown", type=Path, metavar="FILE", help="write the table into that page")
        made.add_argument(
            "--table-of", type=Path, nargs="+", metavar="FILE", help="no run: the table of earlier JSON files"
        )
        made.add_argument(
            "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too"
        )
        made.add_argument(
            "--peers",
            type=partial(names_of, tuple(self.peers)),
            help="only these; for work on the script, as the run then fails for want of the others",
        )
        return made

    def run(
        self,
        options: argparse.Namespace,
        names: Sequence[str],
        measure: Callable[[str], Result],
        asked: Callable[[str], Sequence[str]],
    ) -> int:
        """Measure workloads, print the figures, write them, and return the exit status.

        `asked` gives the peers of a workload that must have been measured, or have refused.
        """
        if options.table_of:
            earlier = [self.kind(**entry) for file in options.table_of for entry in json.loads(file.read_text())]
            self._write_table(earlier, options.markdown)
            return 0
        results: list[Result] = []
        wrong: list[str] = []
        for name in names:
            result = measure(name)
            results.append(result)
            say(text_table([result]) + "\n")
            wrong += [f"{name}: {problem}." for problem in problems(result, asked(name))]
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps([each.to_dict() for each in results], indent=1) + "\n")
        self._write_table(results, options.markdown)
        for problem in wrong:
            sys.stderr.write(problem + "\n")
        return 1 if wrong else 0

    def _write_table(self, results: Sequence[Result], page: Path | None) -> None:
        if page:
            before = page.read_text() if page.is_file() else ""
            page.write_text(with_table(before, self.table(results), self.mark))


def rounds(options: argparse.Namespace) -> int:
    """Return how many rounds were asked for."""
    return int(options.repeats or (2 if options.quick else 3))


def names_of(known: Sequence[str], text: str) -> list[str]:
    """Return the names of a list with commas, each given in full or by its beginning."""
    found: dict[str, None] = {}
    for part in text.split(","):
        matching = [name for name in known if name.startswith(part.strip())]
        if not matching:
            raise argparse.ArgumentTypeError(f"nothing is called {part.strip()!r}; there are {', '.join(known)}")
        found |= dict.fromkeys([part.strip()] if part.strip() in known else matching)
    return list(found)


def say(text: str) -> None:
    """Print, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
