"""The command line: the only part that writes to the terminal."""

from synapse.cli.app import main

__all__ = ["main"]
