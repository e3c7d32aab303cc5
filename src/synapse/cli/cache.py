"""What is kept: the recordings that later runs find again, and whether they and the run folders are whole."""

from pathlib import Path
from typing import Annotated

import typer

from synapse.cli import terminal
from synapse.errors import RunFolderError, SettingsError

Folder = Annotated[
    Path | None, typer.Option("--cache", help="Folder of recordings. [$SYNAPSE_CACHE, else ~/.cache/synapse]")
]

cache = typer.Typer(help="Recordings that are kept: list, verify and remove them.", no_args_is_help=True)


@cache.command()
def ls(folder: Folder = None) -> None:
    """List the recordings, those used last first.

    Example: `synapse cache ls`
    """
    from synapse.recording import Shelf, default_shelf

    shelf = Shelf(folder or default_shelf())
    terminal.show_recordings(shelf.recordings(), shelf.drafts(), shelf.folder)


@cache.command("verify")
def verify_cache(folder: Folder = None) -> None:
    """Read every recording and compare it with what was written; exit status 1 where something is wrong.

    Example: `synapse cache verify`
    """
    from synapse.recording import Shelf, default_shelf

    _verify([recording.folder for recording in Shelf(folder or default_shelf()).recordings()])


@cache.command()
def prune(
    folder: Folder = None,
    older_than: Annotated[float, typer.Option(help="Only what was not used for so many days.")] = 0.0,
) -> None:
    """Remove recordings, and what is left of recordings that were not finished.

    Example: `synapse cache prune --older-than 30`
    """
    from synapse.recording import Shelf, default_shelf

    if older_than < 0:
        raise SettingsError(f"--older-than is {older_than:g}; a number of days, 0 or more, was expected.")
    removed = Shelf(folder or default_shelf()).prune(older_than=older_than)
    for path in removed:
        terminal.out.print(f"Removed {path}", markup=False, soft_wrap=True)
    terminal.out.print(f"{len(removed)} removed.")


def verify(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or recordings.")],
) -> None:
    """Compare every file of a run with what was written; exit status 1 where something is wrong.

    Example: `synapse verify runs/mine`
    """
    for folder in folders:
        if not folder.is_dir():
            raise RunFolderError(f"{str(folder)!r} is no folder; a run folder or a recording was expected.")
    _verify(folders)


def _verify(folders: list[Path]) -> None:
    from synapse.integrity import flaws

    broken = 0
    for folder in folders:
        found = flaws(folder)
        broken += bool(found)
        terminal.out.print(f"{folder}: {'damaged' if found else 'whole'}", markup=False, soft_wrap=True)
        for flaw in found:
            terminal.out.print(f"  {flaw}", markup=False, soft_wrap=True)
    if broken:
        raise typer.Exit(1)
