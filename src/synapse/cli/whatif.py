"""`synapse whatif`: one input before and under interventions, beside random ones of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from synapse.cli import terminal
from synapse.errors import SettingsError

if TYPE_CHECKING:  # these load the model library, which a call for help should not wait for
    from synapse.edits import Edit
    from synapse.model.classifier import Classifier
    from synapse.whatif import WhatIf

EDITS, INPUT = "What is edited", "What the input is"

_SPEC = "such as layer=5,top=50,class=sqli"
_KINDS = {"zero": "zero", "scale": "scale", "flip": "sign-flip", "noise": "noise", "mean": "mean"}
"""Option -> kind of intervention; in this order they act where several edit the same neurons."""

# Settings of a study that say how its model was loaded.
LOADING = ("labels", "max_length", "dtype", "blocks", "readout", "mlp", "attention", "final")
COLUMNS = ("text", "pair", "file", "signal", "ids", "label")

Spec = list[str] | None


def whatif(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a classifier.")],
    text: Annotated[str, typer.Argument(help="The input: a text.")],
    zero: Annotated[
        Spec, typer.Option(metavar="EDIT", help=f"Set neurons to 0, {_SPEC}.", rich_help_panel=EDITS)
    ] = None,
    scale: Annotated[
        Spec, typer.Option(metavar="EDIT", help="Multiply them: add factor=0.5.", rich_help_panel=EDITS)
    ] = None,
    flip: Annotated[Spec, typer.Option(metavar="EDIT", help="Flip their sign.", rich_help_panel=EDITS)] = None,
    noise: Annotated[
        Spec,
        typer.Option(
            metavar="EDIT", help="Add noise of strength=1 deviations; needs --reference.", rich_help_panel=EDITS
        ),
    ] = None,
    mean: Annotated[
        Spec, typer.Option(metavar="EDIT", help="Set them to their mean; needs --reference.", rich_help_panel=EDITS)
    ] = None,
    edit: Annotated[
        Spec,
        typer.Option(
            metavar="EDIT", help="Any other kind: kind=clamp,quantile=0.01,layer=5,units=1-9.", rich_help_panel=EDITS
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder of this model, for top= and bottom=.", rich_help_panel=EDITS)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Ranking of the run. [the one that was swept]", rich_help_panel=EDITS)
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Labelled file, for means and deviations.", rich_help_panel=EDITS)
    ] = None,
    pair: Annotated[str | None, typer.Option(help="The second text of a pair.", rich_help_panel=INPUT)] = None,
    file: Annotated[
        bool, typer.Option("--file", help="The input is the path of an image or a sound.", rich_help_panel=INPUT)
    ] = False,
    ids: Annotated[bool, typer.Option("--ids", help="The input is token ids.", rich_help_panel=INPUT)] = False,
    mask: Annotated[
        str | None, typer.Option(help="Put this in a word's place, such as [MASK]. [it is left out]")
    ] = None,
    words: Annotated[int, typer.Option(min=0, help="How many words are shown.")] = 10,
    draws: Annotated[int, typer.Option(help="Random sets of the same size, 10 or more.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file too.")] = None,
) -> None:
    """Show what a classifier says of one input before and after neurons are edited, and which words it then reads.

    An EDIT is written layer=5,top=50,class=sqli: the layer; which neurons (top=, bottom=, random= with a count, a share
    or per cent; units=1-9; units=all); whose ranking; then, if wanted, component=mlp and scope=readout-onward or all.
    Options may be given several times and together.

    Example: `synapse whatif path/to/model "id=1' OR 1=1" --zero layer=3,top=50%,class=sqli --run runs/mine`
    """
    from synapse.data.reading import read_examples
    from synapse.edits import parse_edit, rankings_for, references_for
    from synapse.model.classifier import Classifier
    from synapse.report.run import open_run
    from synapse.store import write_json
    from synapse.whatif import what_if_edits

    given = dict(zip(_KINDS, (zero, scale, flip, noise, mean), strict=True))
    said = [(_KINDS[name], f"--{name}", spec) for name, specs in given.items() for spec in specs or ()]
    said += [_kind_of(spec) for spec in edit or ()]
    if not said:
        raise SettingsError(f"No edit is given; add one or more, such as --zero {_SPEC.removeprefix('such as ')}.")
    edits = [parse_edit(kind, spec, option=option) for kind, option, spec in said]
    item = _item(text, pair=pair, is_file=file, is_ids=ids)
    settings = {} if run is None else open_run(run).manifest.get("settings", {})
    loading = {name: settings[name] for name in LOADING if settings.get(name) is not None}
    columns = {name: settings[name] for name in COLUMNS if settings.get(name) is not None}
    examples = None if reference is None else read_examples(reference, **columns)
    classifier = Classifier.from_pretrained(model, device=device, trust_remote_code=trust_remote_code, **loading)
    rankings = rankings_for(edits, run, classifier, method=method)
    references = references_for(edits, examples, classifier, seed=seed)
    result = what_if_edits(
        classifier, item, edits, rankings=rankings, references=references, draws=draws, seed=seed, mask=mask
    )
    methods = {component: ranking.method for component, ranking in rankings.items()}
    sentences = [
        _sentence(
            each,
            n=len(made.neurons),
            width=classifier.sites(each.component)[each.layer].width,
            method=methods.get(each.component, ""),
        )
        for each, made in zip(edits, result.interventions, strict=True)
    ]
    _show(result, sentences, n_words=words, mask=mask)
    if not result.flipped and any(_can_be_read_again(each, classifier) for each in edits):
        terminal.out.print(
            "\nNote: only the readout row was edited, before the last layer; later layers can read what was taken "
            "again from the other rows. scope=readout-onward or scope=all takes it away for good."
        )
    if json_file is not None:
        write_json(json_file, {"input": [text, pair] if pair else text, "mask": mask, **result.to_dict()})
        terminal.out.print(f"\nJSON: {json_file}", markup=False)


def _kind_of(spec: str) -> tuple[str, str, str]:
    """Return kind, option and the rest of what `--edit` was given."""
    parts = [part.strip() for part in spec.split(",")]
    kinds = [part.removeprefix("kind=") for part in parts if part.startswith("kind=")]
    if len(kinds) != 1:
        raise SettingsError(f"--edit {spec}: one kind is needed, such as kind=clamp.")
    return kinds[0], "--edit", ",".join(part for part in parts if not part.startswith("kind="))


def _item(text: str, *, pair: str | None, is_file: bool, is_ids: bool) -> Any:
    """Return the input as the library takes it."""
    if (pair is not None) + is_file + is_ids > 1:
        raise SettingsError("The input is one of a text, a pair (--pair), a file (--file) and token ids (--ids).")
    if is_file:
        if not Path(text).is_file():
            raise SettingsError(f"There is no file {text!r}; with --file the input is the path of an image or a sound.")
        return Path(text)
    if is_ids:
        if not text.replace(" ", "").isdigit():
            raise SettingsError(
                f"The input is {text!r}; with --ids it is token ids, whole numbers with blanks between."
            )
        return tuple(int(part) for part in text.split())
    return text if pair is None else (text, pair)


def _can_be_read_again(edit: Edit, classifier: Classifier) -> bool:
    """Return whether other rows keep what an edit takes away: re-supply, which is no sign of redundancy."""
    reads_every_row = classifier.anatomy.readout in ("mean", "first-and-mean")
    return edit.scope == "readout" and not reads_every_row and edit.layer < len(classifier.sites(edit.component)) - 1


def _sentence(edit: Edit, *, n: int, width: int, method: str) -> str:
    """Return what an edit does, in words."""
    strength = f" {edit.kind.strength:g}" if edit.kind.recipe.strength else ""
    towards = f" towards {edit.kind.label}" if edit.kind.label else ""
    which = f"{n} of {width}" if n < width else f"all {width}"
    chosen = "random" if edit.selection == "random" and n < width else ""
    if edit.needs_ranking and n < width:
        end = "highest" if edit.selection == "top" else "lowest"
        chosen = f"ranked {end} by {method} {f'for {edit.label}' if edit.label else 'over all classes'}"
    where = {
        "readout": "in the readout row",
        "readout-onward": "in the readout row, there and in every later layer",
        "all": "in all rows",
        "non-padding": "in all rows",
    }[edit.scope]
    neurons = f"{which} {edit.component} neurons of layer {edit.layer}"
    return f"{edit.kind.name}{strength}{towards}: " + ", ".join(part for part in (neurons, chosen, where) if part)


def _show(result: WhatIf, sentences: Sequence[str], *, n_words: int, mask: str | None) -> None:
    """Print what was found: the verdict, the classes, the control and the words."""
    from synapse.whatif import probabilities

    out = terminal.out
    for sentence in sentences:
        out.print(f"Edit: {escape(sentence)}")
    now, then = escape(result.prediction_before), escape(result.prediction_after)
    out.print(
        f"\nPrediction: [bold]{now} -> {then}[/bold], flipped\n"
        if result.flipped
        else f"\nPrediction: [bold]{now}[/bold], as before\n"
    )
    table = _table("class", "logit before", "after", "random sets", "probability before", "after", "random sets")
    before, after = probabilities(result.before), probabilities(result.after)
    control = probabilities(result.controls)
    order = sorted(range(len(result.labels)), key=lambda label: -before[label])
    for label in order:
        table.add_row(
            escape(result.labels[label]),
            f"{result.before[label]:.2f}",
            f"{result.after[label]:.2f}",
            f"{result.controls[:, label].mean():.2f}" if len(control) else "-",
            f"{before[label]:.3f}",
            f"{after[label]:.3f}",
            f"{control[:, label].mean():.3f}" if len(control) else "-",
        )
    out.print(table)
    if len(control):
        _show_control(result)
    if len(result.words) and n_words:
        _show_words(result, n_words, mask)
    for note in result.notes:
        out.print(f"\nNote: {escape(note)}")


def _show_control(result: WhatIf) -> None:
    """Print how random interventions of the same size compare."""
    flips, n, changes = result.control_flips, len(result.controls), result.control_changes
    hits = round((flips.value or 0) * n)
    terminal.out.print(
        f"\nRandom control, {n} draws of as many neurons: the prediction flips in {hits} of {n} "
        f"[bright_black]({flips.low:.0%} to {flips.high:.0%} with 95 % confidence)[/bright_black].\n"
        f"Log-odds of {escape(result.prediction_before)}: {result.change:+.2f} under the edit; at random "
        f"{changes.mean():+.2f} on average, from {changes.min():+.2f} to {changes.max():+.2f}; "
        f"{result.as_far} of {n} move them at least as far."
    )


def _show_words(result: WhatIf, n_words: int, mask: str | None) -> None:
    """Print the words whose evidence moved most."""
    how = "is left out" if mask is None else f"is replaced by {mask}"
    label, moved = escape(result.prediction_before), result.moved
    terminal.out.print(
        f"\nWords whose evidence for {label} moved most "
        f"[bright_black](evidence: log-odds of {label} that are lost when the word {escape(how)})[/bright_black]"
    )
    table = _table("word", "place", "before", "after", "change")
    for row in moved.head(n_words).itertuples():
        table.add_row(
            f"[bold]{escape(str(row.word))}[/bold]",
            str(row.place),
            f"{row.before:+.2f}",
            f"{row.after:+.2f}",
            f"{row.change:+.2f}",
        )
    terminal.out.print(table)
    if len(moved) > n_words:
        terminal.out.print(f"[bright_black]{len(moved) - n_words} more moved less; --words shows them.[/bright_black]")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
