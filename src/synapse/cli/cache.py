"""`synapse cache`: the recordings that are kept, for later runs to find again."""

from pathlib import Path
from typing import Annotated

import typer

from synapse.cli import terminal
from synapse.cli.verify import show_flaws
from synapse.errors import SettingsError

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

    folders = [recording.folder for recording in Shelf(folder or default_shelf()).recordings()]
    if len(show_flaws(folders)) < len(folders):
        raise typer.Exit(1)


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
