"""The commands. Each reads its options, calls the library and shows what came out; errors become one line."""

import json
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from synapse.cli import terminal
from synapse.cli.cache import cache as cache_commands
from synapse.cli.verify import verify
from synapse.cli.whatif import whatif
from synapse.errors import SettingsError, SynapseError

# Threads that wait for work sleep instead of spinning. Read when PyTorch loads its OpenMP library, so it stands before
# that; where other processes want the cores too, spinning makes everything many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="synapse",
    help="Look inside a Transformer classifier: which neurons carry its decisions, how much of them can be lost, "
    "which classes are fragile, and how little redirects a prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line on stderr and exit status 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app(standalone_mode=True)
    except SynapseError as error:
        terminal.err.print("Error: " + " ".join(str(error).split()), style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        terminal.err.print("Interrupted; nothing was written.")
        sys.exit(130)


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Engine(StrEnum):
    """Who runs what takes long."""

    serial = "serial"
    ray = "ray"


class Dtype(StrEnum):
    """In what precision to compute."""

    float32 = "float32"
    auto = "auto"


INPUTS, FINDINGS, ENGINE = "What the examples are", "Where the anatomy is not found", "How the sweep is run"
CLUSTER = "Who runs what takes long"

Executor = Annotated[
    Engine | None, typer.Option(help="serial (this process) or ray (workers). [serial]", rich_help_panel=CLUSTER)
]
Workers = Annotated[int | None, typer.Option(help="Workers at a time. [one a CPU core]", rich_help_panel=CLUSTER)]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: 'auto' or host:port. [started on this machine]", rich_help_panel=CLUSTER),
]
GpusPerWorker = Annotated[
    float | None, typer.Option(help="GPUs of a worker, fractions too. [0]", rich_help_panel=CLUSTER)
]
CpusPerWorker = Annotated[float | None, typer.Option(help="CPUs of a worker. [1]", rich_help_panel=CLUSTER)]
ThreadsPerWorker = Annotated[int | None, typer.Option(help="CPU threads of a worker. [1]", rich_help_panel=CLUSTER)]
WorkerLogs = Annotated[Path | None, typer.Option(help="Folder for one log file a worker.", rich_help_panel=CLUSTER)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Blocks = Annotated[
    str | None,
    typer.Option(help="Names of the blocks: a pattern such as 'layers.*', or with commas.", rich_help_panel=FINDINGS),
]
ReadoutRows = Annotated[
    str | None, typer.Option(help="Rows that the head reads: first, last, mean, ...", rich_help_panel=FINDINGS)
]
Mlp = Annotated[str | None, typer.Option(help="Name of the down projection inside a block.", rich_help_panel=FINDINGS)]
Attention = Annotated[
    str | None, typer.Option(help="Name of attention's output projection inside a block.", rich_help_panel=FINDINGS)
]
Final = Annotated[
    str | None, typer.Option(help="Name of the linear map that gives the logits.", rich_help_panel=FINDINGS)
]


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a sequence classifier, or a study file (.yaml).")],
    train: Annotated[
        str | None,
        typer.Option(help="Labelled examples that neurons are ranked on: a table, folder, URL or dataset:NAME:SPLIT."),
    ] = None,
    test: Annotated[str | None, typer.Option(help="The same, to measure on. One file alone is split.")] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="What is studied, with commas: residual, mlp, attention, heads, pooler. [residual]"),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts. [text]", rich_help_panel=INPUTS)] = None,
    pair: Annotated[
        str | None, typer.Option(help="Column of the second text of a pair.", rich_help_panel=INPUTS)
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Column of the paths of images or sounds (wav).", rich_help_panel=INPUTS)
    ] = None,
    signal: Annotated[
        str | None, typer.Option(help="Columns of numbers: a pattern such as 't*'.", rich_help_panel=INPUTS)
    ] = None,
    ids: Annotated[str | None, typer.Option(help="Column of token ids.", rich_help_panel=INPUTS)] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels. [label]", rich_help_panel=INPUTS)] = None,
    labels: Annotated[str | None, typer.Option(help="Class names in the order of the logits, with commas.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Run folder to make, or the URL of one elsewhere (s3://...). [runs/NAME]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder where recordings are kept and found again, or 'off'. [$SYNAPSE_CACHE, else ~/.cache/synapse]"
        ),
    ] = None,
    device: Annotated[Device | None, typer.Option(help="Where to compute. [auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice. [0]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all]")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Cut texts at this many tokens. [the model's own limit]")
    ] = None,
    train_examples: Annotated[str | None, typer.Option(help="Training examples used, or 'all'. [2000]")] = None,
    examples: Annotated[str | None, typer.Option(help="Test examples in the sweep, or 'all'. [64]")] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            help="Families of attacks, with commas: logits, head, weight-noise, pruning, random-bits, "
            "adversarial-weights, bits, activations."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Ranking methods, with commas; the first is swept in full, the others to judge them beside it."
        ),
    ] = None,
    scopes: Annotated[str | None, typer.Option(help="Where interventions act, with commas.")] = None,
    fractions: Annotated[str | None, typer.Option(help="Shares of the width to edit, with commas.")] = None,
    kinds: Annotated[str | None, typer.Option(help="Interventions, with commas; the first is swept whole.")] = None,
    random_sets: Annotated[int | None, typer.Option(help="Random sets of every size. [10]")] = None,
    random_sets_per_example: Annotated[
        int | None, typer.Option(help="How many random sets of a size each example meets. [1]")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="auto, exact (fail where nothing can be reused) or plain. [auto]", rich_help_panel=ENGINE),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            help="Stop a cell once its change of accuracy is known to so much, such as 0.005.", rich_help_panel=ENGINE
        ),
    ] = None,
    autocast: Annotated[
        str | None, typer.Option(help="Run the sweep in reduced precision: bf16 or fp16.", rich_help_panel=ENGINE)
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the report. [name of the model]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Run in float32, or as the weights are. [float32]")] = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    threads_per_worker: ThreadsPerWorker = None,
    worker_logs: WorkerLogs = None,
    trust_remote_code: TrustRemoteCode = False,
    blocks: Blocks = None,
    readout: ReadoutRows = None,
    mlp: Mlp = None,
    attention: Attention = None,
    final: Final = None,
) -> None:
    """Study a classifier on labelled examples, and write a run folder with its report.

    Example: `synapse run path/to/model --train train.csv --test test.csv --out runs/mine`

    Example: `synapse run study.yaml`, where the file holds the same names as the options (model: ..., train: ...).
    """
    from synapse.recording import default_shelf
    from synapse.settings import make_settings, read_settings

    given: dict[str, Any] = {
        "train": train,
        "test": test,
        "sites": _names(sites),
        "text": text,
        "pair": pair,
        "file": file,
        "signal": signal,
        "ids": ids,
        "label": label,
        "labels": _names(labels),
        "out": out,
        "overwrite": overwrite or None,
        "device": device.value if device else None,
        "seed": seed,
        "threads": threads,
        "max_length": max_length,
        "train_examples": _amount(train_examples, "--train-examples"),
        "examples": _amount(examples, "--examples"),
        "attacks": _names(attacks),
        "methods": _names(methods),
        "scopes": _names(scopes),
        "fractions": _numbers(fractions),
        "kinds": _names(kinds),
        "random_sets": random_sets,
        "random_sets_per_example": random_sets_per_example,
        "engine": engine,
        "precision": precision,
        "autocast": autocast,
        "title": title,
        "dtype": dtype.value if dtype else None,
        "executor": executor.value if executor else None,
        "workers": workers,
        "address": address,
        "gpus_per_worker": gpus_per_worker,
        "cpus_per_worker": cpus_per_worker,
        "threads_per_worker": threads_per_worker,
        "worker_logs": worker_logs,
        "trust_remote_code": trust_remote_code or None,
        **_findings(blocks, readout, mlp, attention, final),
    }
    is_file = Path(model).suffix in (".yaml", ".yml")
    values: dict[str, Any] = read_settings(Path(model)) if is_file else {"model": model}
    values |= {name: value for name, value in given.items() if value is not None}
    if cache is not None or "cache" not in values:
        values["cache"] = cache or default_shelf()
    finished = _study(make_settings(**values))
    terminal.show_run(finished)
    terminal.out.print(f"\nReport: {finished}/report.html", markup=False)


def _study(settings: Any) -> Path | str:
    """Load what the settings name, say what is planned, and run it."""
    from synapse.cli.loading import check_named, load_study
    from synapse.forecasting import forecast
    from synapse.store import check_free
    from synapse.study import run_study

    check_named(settings)
    out = settings.out or Path("runs") / Path(settings.model).name
    check_free(out, overwrite=settings.overwrite)
    classifier, train, test = load_study(settings)
    terminal.show_forecast(forecast(classifier, train, test, settings), settings.cache)
    with settings.opened_executor() as executor, terminal.stage_progress() as progress:
        return run_study(
            classifier,
            train,
            test,
            settings=settings,
            out=out,
            executor=executor,
            progress=progress,
            command=_command_line(),
        )


@app.command()
def plan(
    study: Annotated[Path, typer.Argument(help="Study file (.yaml), as `synapse run` takes it.")],
    workers: Annotated[int | None, typer.Option(help="Workers. [those of the file, or one]")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Examples that a worker's model reads in a second. [measured here, in one process]"),
    ] = None,
) -> None:
    """Print what a study will cost, on this machine or on workers of a given rate; nothing is started.

    Example: `synapse plan study.yaml --workers 8 --rate 2000`
    """
    from synapse.cli.loading import load_study
    from synapse.forecasting import forecast
    from synapse.settings import make_settings, read_settings

    if (workers is not None and workers < 1) or (rate is not None and rate <= 0):
        raise SettingsError(f"{workers} workers of a rate of {rate} were given; numbers above 0 were expected.")
    settings = make_settings(**read_settings(study))
    found = forecast(*load_study(settings), settings)
    terminal.show_plan(found, workers or settings.workers or 1, None if rate is None else 1 / rate)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a classifier.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    labels: Annotated[str | None, typer.Option(help="Class names in the order of the logits, with commas.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    blocks: Blocks = None,
    readout: ReadoutRows = None,
    mlp: Mlp = None,
    attention: Attention = None,
    final: Final = None,
) -> None:
    """Show a classifier's anatomy, as found and proved: blocks, sites, readout rows, head.

    Example: `synapse inspect path/to/model --json`
    """
    from synapse.model.classifier import Classifier

    findings = _findings(blocks, readout, mlp, attention, final)
    classifier = Classifier.from_pretrained(
        model, labels=_names(labels), trust_remote_code=trust_remote_code, **findings
    )
    found = classifier.describe()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        terminal.show_anatomy(found)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the three runs and the comparison.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    executor: Executor = None,
    workers: Workers = None,
) -> None:
    """Study three embedded classifiers (cybersecurity, healthcare, vision) offline and compare them.

    Example: `synapse demo --out runs/demo`
    """
    from synapse.demo.study import run_demo
    from synapse.elsewhere import only_here
    from synapse.report.compare import comparison_table, write_comparison
    from synapse.settings import make_settings

    out = only_here(out, "a demonstration")
    given = {"executor": executor.value if executor else "serial", "workers": workers}
    with make_settings(**given).opened_executor() as opened, terminal.stage_progress() as progress:
        runs = run_demo(out, seed=seed, executor=opened, progress=progress)
    for finished in runs:
        terminal.show_run(finished)
    terminal.out.print("\n[bold]Side by side[/bold]")
    terminal.show_comparison(comparison_table(runs))
    comparison = write_comparison(runs, out)
    for page in (*(finished / "report.html" for finished in runs), comparison):
        terminal.out.print(f"Report: {page}", markup=False)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Run folder, or the URL of one elsewhere.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write. [RUN/report.html; of a run elsewhere: NAME-report.html]")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for figures as SVG, for papers.")] = None,
) -> None:
    """Write the report of a run again, from its folder alone.

    Example: `synapse report runs/mine`
    """
    from synapse.report.html import write_report
    from synapse.report.paper import paper_figures

    terminal.out.print(f"Report: {write_report(run, out)}", markup=False)
    for path in paper_figures(run, figures) if figures else ():
        terminal.out.print(f"Figure: {path}", markup=False)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more run folders, or URLs of such.")],
    out: Annotated[Path, typer.Option(help="Folder for comparison.html and comparison.json.")] = Path(
        "runs/comparison"
    ),
) -> None:
    """Set runs side by side on relative axes.

    Example: `synapse compare runs/demo/cybersecurity runs/demo/vision --out runs/both`
    """
    from synapse.report.compare import comparison_table, write_comparison

    if len(runs) < 2:
        raise SettingsError(f"{len(runs)} run was given; two or more are needed for a comparison.")
    terminal.show_comparison(comparison_table(runs))
    terminal.out.print(f"Report: {write_comparison(runs, out)}", markup=False)


app.command()(whatif)
app.command()(verify)
app.add_typer(cache_commands, name="cache")


def _findings(
    blocks: str | None, readout: str | None, mlp: str | None, attention: str | None, final: str | None
) -> dict[str, Any]:
    """Return what was said by hand about the anatomy, for the classifier and for the settings."""
    names = _names(blocks)
    return {
        "blocks": names[0] if names and len(names) == 1 else names,
        "readout": readout,
        "mlp": mlp,
        "attention": attention,
        "final": final,
    }


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{text!r} is no list of numbers; something like 0.1,0.5,1 was expected.") from error


def _amount(text: str | None, option: str) -> int | str | None:
    if text is None or text == "all":
        return text
    if not text.isdigit():
        raise SettingsError(f"{option} is {text!r}; a number or 'all' was expected.")
    return int(text)


def _command_line() -> str:
    return " ".join(["synapse", *sys.argv[1:]])
