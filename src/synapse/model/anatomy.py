"""What is known of a classifier's parts: where it computes what, and what was said about that by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from synapse.errors import SettingsError, near
from synapse.model.hooks import Site
from synapse.model.readout import RowWeights
from synapse.model.trace import Replayable
from synapse.types import READOUTS, Component, Readout


@dataclass(frozen=True)
class Overrides:
    """Findings that are given by hand, by the names of `module.named_modules()`; None is found.

    `blocks` are names in call order, or one pattern such as `encoder.layer.*`; `mlp` and `attention` name the down and
    the output projection inside a block (`output.dense`); `final` is the linear map that gives the logits.
    """

    blocks: str | Sequence[str] | None = None
    readout: str | None = None
    mlp: str | None = None
    attention: str | None = None
    final: str | None = None

    def check(self, module: nn.Module) -> None:
        """Refuse names that the module does not have.

        Raises:
            SettingsError: the first of them.
        """
        known = [name for name, _ in module.named_modules() if name]
        if self.readout is not None and self.readout not in READOUTS:
            raise SettingsError(f"There is no readout {self.readout!r}; one of {', '.join(READOUTS)} was expected.")
        patterns = [self.blocks] if isinstance(self.blocks, str) else list(self.blocks or ())
        for pattern in [*patterns, *([self.final] if self.final else [])]:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise SettingsError(f"The model has no module {pattern!r}.{near(pattern, known)}")


@dataclass(frozen=True)
class Anatomy:
    """Where a classifier computes what; names are those of `module.named_modules()`.

    `sites` holds the sites of every component that was found, in order of the layers, and `missing` says why another
    one was not. `before` are the outermost modules that run before the blocks and can be passed over; `replays` says
    how the outputs of the blocks are given again for chosen examples, and is empty where that is unclear. `inside` says
    the same of what runs inside a block before its site is reached, by component and layer; `unmixed` lists for every
    layer the maps that see each row of the block's input alone (the projections of its attention). `head` lists
    what runs after the last block; `final` is the linear map that gives the logits, or None where the head does not end
    in one. `readout_is_proved` is false only where one was given by hand that the head was seen not to keep to. `pads`
    says whether examples of unequal length may share a batch: padding leaves their logits alone, and which rows it
    fills is known. `n_tokens` is the number of rows of the longest example that the anatomy was proved on, `shapes`
    that of its inputs; `inputs_with_rows` names those that have an entry for every row. `n_tokens_follow_length` says
    whether shorter examples have fewer.
    """

    sites: Mapping[Component, tuple[Site, ...]]
    missing: Mapping[Component, str]
    n_heads: int | None
    rows: RowWeights
    readout_is_proved: bool
    n_tokens: int
    n_tokens_follow_length: bool
    shapes: Mapping[str, torch.Size]
    inputs_with_rows: frozenset[str]
    pads: bool
    before: tuple[Replayable, ...]
    replays: tuple[Replayable, ...]
    inside: Mapping[Component, tuple[tuple[Replayable, ...], ...]]
    unmixed: tuple[tuple[Site, ...], ...]
    head: tuple[str, ...]
    final: str | None
    proofs: Mapping[str, str]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks in call order; one that is called several times stands there as often."""
        return tuple(site.module for site in self.sites["residual"])

    @property
    def width(self) -> int:
        """Number of units of a block's output."""
        return self.sites["residual"][0].width

    @property
    def readout(self) -> Readout:
        """The rows that the head reads."""
        return self.rows.readout
