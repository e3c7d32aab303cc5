"""What the terminal shows: progress while it works, scorecards and comparisons when it is done."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from synapse.errors import RunFolderError
from synapse.forecasting import START_SECONDS, Forecast
from synapse.recording import Recording, in_words
from synapse.report.findings import key_numbers, sentences
from synapse.report.html import sweep_notes
from synapse.report.run import open_run
from synapse.study import StageProgress

# A file or a pipe has no width of its own; tables are not cut to that of a small terminal there.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class RateColumn(ProgressColumn):
    """Steps a second of a stage: examples, runs or items, as it counts them."""

    def render(self, task: Task) -> Text:
        """Return the rate, nothing before there is one."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")


@contextmanager
def stage_progress() -> Iterator[StageProgress]:
    """Give a callback that draws one bar a stage with the time left; it draws nothing when stderr is no terminal."""
    columns = (
        TextColumn("  {task.description:<18}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def finish_all() -> None:
            """Fill the bars of earlier stages: one without countable steps would move on for ever."""
            for task in tasks.values():
                total = bars.tasks[task].total or 1
                bars.update(task, total=total, completed=total)

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                finish_all()
                tasks[stage] = bars.add_task(stage, total=total or None)
            elif total:
                bars.update(tasks[stage], completed=done, total=total)

        yield show
        finish_all()


def show_forecast(forecast: Forecast, cache: Path | None) -> None:
    """Say what will be run, about how long it takes, and what is kept."""
    sweep = forecast.sweep
    kept = "" if cache is None else f"\nRecordings are kept in {cache}: {in_words(forecast.disk_bytes)}, unless there."
    err.print(
        f"Planned: {forecast.train_examples:,} training and {forecast.test_examples:,} test examples; "
        f"{sweep.cells:,} interventions on {forecast.sweep_examples:,} test examples, {sweep.runs:,} runs.\n"
        f"About {forecast.forward_passes:,} full forward passes' worth of work: "
        f"{_duration(forecast.seconds)}, and up to a minute for probes and measures.{kept}",
        markup=False,
    )


def show_plan(forecast: Forecast, workers: int, seconds_per_pass: float | None) -> None:
    """Print what a study is cut into, and the time that so many workers need."""
    pace = forecast.seconds_per_pass if seconds_per_pass is None else seconds_per_pass
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("stage", "items", "forward passes", "comes back", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in forecast.stages:
        table.add_row(
            stage.name,
            f"{stage.items:,}",
            f"{stage.passes:,.0f}",
            in_words(stage.moved_bytes) if stage.moved_bytes else "-",
            f"{stage.seconds(workers, pace):,.0f}",
        )
    out.print(table)
    here = "as measured here" if seconds_per_pass is None else f"as given; here {1 / forecast.seconds_per_pass:,.1f}"
    total = forecast.seconds_on(workers, pace)
    out.print(
        f"{workers} worker{'s' if workers > 1 else ''}, each {1 / pace:,.1f} examples a second ({here}): about "
        f"{_duration(total)}, of which {START_SECONDS:.0f} s to start. Probes, rankings, measures and other attacks "
        "come on top.",
        markup=False,
    )
    if forecast.disk_bytes:
        out.print(f"Recordings take {in_words(forecast.disk_bytes)} on disk, unless they are there.", markup=False)


def show_run(run: Path | str) -> None:
    """Print a run's findings and key numbers."""
    opened = open_run(run)
    out.print(f"\n[bold]{_plain(str(opened.manifest['title']))}[/bold]")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for number in key_numbers(opened):
        table.add_row(
            number.name, f"[bold]{_plain(number.value)}[/bold]", _plain(number.spread), _plain(number.meaning)
        )
    out.print(table)
    for line in [*sentences(opened), *sweep_notes(opened.manifest.get("sweep", {}))]:
        out.print(f"- {_plain(line)}")


def show_anatomy(found: Mapping[str, Any]) -> None:
    """Print what was found of a classifier's anatomy, and how each finding was proved."""
    facts = {
        "blocks": f"{found['n_blocks']} of width {found['width']}: {_ends(found['blocks'])}",
        "readout": f"{found['readout']} ({found['proofs']['readout']})",
        "head": ", ".join(found["head"]),
        "final map": found["final"] or "none: the head does not end in a linear map",
        "padding": "examples of unequal length share batches"
        if found["pads"]
        else "moves the logits or is not known, so a batch holds examples of one length",
        "labels": ", ".join(found["labels"]),
        "parameters": f"{found['parameters']:,}",
    }
    out.print(f"[bold]{_plain(found['name'])}[/bold]")
    for name, fact in facts.items():
        out.print(f"{name}: {_plain(str(fact))}")
    sites = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("site", "layers", "width", "where"):
        sites.add_column(column)
    for component, modules in found["sites"].items():
        heads = f" ({found['n_heads']} heads)" if component == "heads" else ""
        sites.add_row(component, str(len(modules)), f"{found['widths'][component]}{heads}", _plain(_ends(modules)))
    for component, why in found["missing"].items():
        sites.add_row(component, "-", "-", _plain(f"not found: {why}"))
    out.print(sites)
    for note in found["notes"]:
        out.print(f"note: {_plain(note)}")
    for name, sentence in found["proofs"].items():
        out.print(f"proved, {name}: {_plain(sentence)}")


def _ends(names: Sequence[str]) -> str:
    """Return the first and the last of several names."""
    return names[0] if len(set(names)) == 1 else f"{names[0]} to {names[-1]}"


def show_comparison(table: pd.DataFrame) -> None:
    """Print a comparison: a row for each measure, a column for each run."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", *(str(run) for run in table.index)):
        shown.add_column(_plain(name))
    for measure, values in table.T.iterrows():
        shown.add_row(_plain(str(measure)), *(_plain(str(value)) for value in values))
    out.print(shown)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _plain(text: str) -> str:
    """Return the text with square brackets that the terminal library would read as styles escaped."""
    return text.replace("[", r"\[")


def show_recordings(recordings: Sequence[Recording], drafts: Sequence[Path], folder: Path) -> None:
    """Print the recordings of a folder."""
    table = Table(title=f"Recordings in {folder}", box=None, title_justify="left")
    for name in ("key", "examples", "components", "type", "size", "last used"):
        table.add_column(name)
    total = 0
    for recording in recordings:
        size = sum(path.stat().st_size for path in recording.folder.rglob("*") if path.is_file())
        used = datetime.fromtimestamp(recording.folder.stat().st_mtime).astimezone()
        total += size
        table.add_row(recording.folder.name, *_contents(recording), in_words(size), f"{used:%Y-%m-%d %H:%M}")
    out.print(table)
    out.print(f"{len(recordings)} recordings, {in_words(total)}.")
    for draft in drafts:
        out.print(f"Not finished: {draft}", markup=False, soft_wrap=True)


def _contents(recording: Recording) -> tuple[str, str, str]:
    """Return the number of examples, the components and the type, in words."""
    try:
        layout = recording.layout
    except RunFolderError:
        return "?", "cannot be read", ""
    sizes = ", ".join(f"{name} {layers} x {width}" for name, (layers, width) in layout.components.items())
    return str(layout.n_examples), sizes, layout.dtype
