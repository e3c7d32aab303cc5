"""`synapse verify`: whether folders are whole, and whether the attacks in them still do what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synapse.cli import terminal
from synapse.cli.whatif import COLUMNS, LOADING
from synapse.elsewhere import copied, place_of
from synapse.errors import RunFolderError, SettingsError

if TYPE_CHECKING:  # these load the model library, which a check of files should not wait for
    from synapse.data.examples import Examples
    from synapse.model.classifier import Classifier
    from synapse.settings import Settings

ATTACKS = "Whether attacks do what they say"

Column = str | None


def verify(
    folders: Annotated[
        list[str], typer.Argument(help="Run folders, recordings, folders of saved attacks, or URLs of such.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Apply the attacks too: folder or hub id of the classifier, or a study file.", rich_help_panel=ATTACKS
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="The labelled examples that they were scored on.", rich_help_panel=ATTACKS)
    ] = None,
    text: Annotated[Column, typer.Option(help="Column of the texts. [text]", rich_help_panel=ATTACKS)] = None,
    pair: Annotated[Column, typer.Option(help="Column of the second text of a pair.", rich_help_panel=ATTACKS)] = None,
    file: Annotated[
        Column, typer.Option(help="Column of the paths of images or sounds.", rich_help_panel=ATTACKS)
    ] = None,
    signal: Annotated[
        Column, typer.Option(help="Columns of numbers: a pattern such as 't*'.", rich_help_panel=ATTACKS)
    ] = None,
    ids: Annotated[Column, typer.Option(help="Column of token ids.", rich_help_panel=ATTACKS)] = None,
    label: Annotated[Column, typer.Option(help="Column of the labels. [label]", rich_help_panel=ATTACKS)] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Class names in the order of the logits, with commas.", rich_help_panel=ATTACKS),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Cut texts at this many tokens.", rich_help_panel=ATTACKS)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute: auto, cpu, cuda. [auto]", rich_help_panel=ATTACKS)
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=ATTACKS),
    ] = False,
) -> None:
    """Compare every file with what was written; exit status 1 where something is wrong.

    With --model and --test, saved attacks (a folder with attack.json, or those in a run's folder `attacks`) are also
    applied, and what they do is compared with what was stated. How a run read its examples and its model is taken over.

    Example: `synapse verify runs/mine --model path/to/model --test test.csv`
    """
    places = list(dict.fromkeys(map(place_of, folders)))
    for place in places:
        if isinstance(place, Path) and not place.is_dir():
            raise RunFolderError(f"{str(place)!r} is no folder; a run folder or a recording was expected.")
    if (model is None) != (test is None):
        there, missing = ("--model", "--test") if test is None else ("--test", "--model")
        raise SettingsError(f"{there} is given without {missing}; attacks are applied to a model, on examples.")
    whole = show_flaws(places)
    works = True
    if model is not None:
        columns = {"text": text, "pair": pair, "file": file, "signal": signal, "ids": ids, "label": label}
        names = None if labels is None else tuple(part.strip() for part in labels.split(","))
        loading = {"labels": names, "max_length": max_length, "device": device}
        said = {"test": test, **columns, **loading, "trust_remote_code": trust_remote_code or None}
        given = {name: value for name, value in said.items() if value is not None}
        works = _show_attacks(whole, partial(_settings, model, given))
    if len(whole) < len(places) or not works:
        raise typer.Exit(1)


def show_flaws(places: Sequence[Path | str]) -> dict[Path, Path | str]:
    """Print what is wrong at each place, and return the folders that are whole with their places.

    A folder is the place itself, or a new copy of what is elsewhere.
    """
    from synapse.integrity import flaws

    whole = {}
    for place in places:
        folder = place if isinstance(place, Path) else copied(place)
        found = flaws(folder)
        _print(f"{place}: {'damaged' if found else 'whole'}")
        for flaw in found:
            _print(f"  {flaw}")
        if not found:
            whole[folder] = place
    return whole


def _show_attacks(folders: Mapping[Path, Path | str], settings_for: Callable[[Path], Settings]) -> bool:
    """Print what the attacks in folders that are whole do, and return whether all do what they say."""
    attacks = [(folder, attack) for folder in folders for attack in _attacks_in(folder)]
    if folders and not attacks:
        raise RunFolderError(
            f"No attack is in {', '.join(map(str, folders.values()))}; a folder with attack.json, or with attacks in "
            "its folder `attacks`, was expected."
        )
    loaded, works = cache(_load), True
    for folder, attack in attacks:
        classifier, examples = loaded(settings_for(folder))
        try:
            size, found = _checked(attack, classifier, examples)
            verdict = "does not do what it says" if found else f"does what it says ({size})"
        except (RunFolderError, SettingsError) as error:
            verdict, found = "cannot be checked", [str(error)]
        _print(f"{str(attack).replace(str(folder), str(folders[folder]), 1)}: {verdict}")
        for difference in found:
            _print(f"  {difference}")
        works &= not found
    return works


def _attacks_in(folder: Path) -> list[Path]:
    if (folder / "attack.json").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("attacks/*/attack.json"))


def _settings(model: str, given: Mapping[str, Any], folder: Path) -> Settings:
    """Return how the model and the examples are read: as options say, else as the study file or the run did."""
    from synapse.report.run import open_run
    from synapse.settings import make_settings, read_settings

    said = open_run(folder).manifest.get("settings", {}) if (folder / "scorecard.json").is_file() else {}
    values = {name: said[name] for name in (*LOADING, *COLUMNS) if said.get(name) is not None}
    values |= read_settings(Path(model)) if Path(model).suffix in (".yaml", ".yml") else {"model": model}
    return make_settings(**{**values, **given})


def _load(settings: Settings) -> tuple[Classifier, Examples]:
    from synapse.data.reading import read_examples
    from synapse.model.classifier import Classifier

    assert settings.test is not None
    columns: dict[str, Any] = {**settings.columns()}
    examples = read_examples(settings.test, **columns)
    classifier = Classifier.from_pretrained(
        settings.model,
        labels=settings.labels,
        device=settings.device,
        max_length=settings.max_length,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        **settings.findings(),
    )
    return classifier, examples


def _checked(folder: Path, classifier: Classifier, examples: Examples) -> tuple[str, list[str]]:
    """Return how much an attack consists of, and what it does otherwise than stated."""
    from synapse.attack.bits.found import BitAttack
    from synapse.attack.edits import HeadEdits

    attack: BitAttack | HeadEdits
    if (folder / "flips.safetensors").is_file():
        attack = BitAttack.load(folder)
        size, unit = len(attack.flips), "flip"
    else:
        attack = HeadEdits.load(folder)
        size, unit = len(attack), "pair"
    return f"{size} {unit}{'s' * (size != 1)}", attack.checked(classifier, examples)


def _print(line: str) -> None:
    terminal.out.print(line, markup=False, soft_wrap=True)
