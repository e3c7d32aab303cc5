"""Run a classifier from one of its blocks on: what lies below an edit is never computed twice.

One clean pass of a batch keeps the output of every block, and of what runs before them. A run whose first change is at
layer l starts there: what lies below is passed over, the model's own code does the rest. Nothing here knows an
architecture, and many edited copies of an example share one forward pass.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import Edit, Site, edited_sites, without_hidden_states
from synapse.model.trace import Replay, Replayable, passed_over, tensors_in, with_tensors
from synapse.types import Component


@dataclass(frozen=True, eq=False)
class CleanPass:
    """What one unperturbed forward pass of a batch gave.

    `states[l]` is the output of block l, (example, token, unit); `others` holds the states of other components that
    were asked for; `features` the input of the final linear map at the readout row.
    """

    batch: Batch
    states: tuple[Tensor, ...]
    others: dict[Component, tuple[Tensor, ...]]
    logits: Float[Tensor, "example label"]
    features: Float[Tensor, "example feature"] | None
    replay: Replay

    @property
    def n_tokens(self) -> int:
        """Number of token rows, padding included."""
        return int(self.states[0].shape[1])

    def of(self, component: Component) -> tuple[Tensor, ...]:
        """Return the states of a component, one tensor (example, token, unit) a layer."""
        return self.states if component == "residual" else self.others[component]

    def take(self, chosen: Int[Tensor, "chosen"]) -> "CleanPass":
        """Return the same pass for the chosen examples of the batch."""
        return CleanPass(
            self.batch.take(chosen),
            tuple(states[chosen] for states in self.states),
            {name: tuple(states[chosen] for states in layers) for name, layers in self.others.items()},
            self.logits[chosen],
            None if self.features is None else self.features[chosen],
            self.replay.take(chosen),
        )


def clean_pass(classifier: Classifier, batch: Batch, components: Sequence[Component] = ()) -> CleanPass:
    """Return the block outputs of one unperturbed forward pass, and the states of further components."""
    anatomy = classifier.anatomy
    kept: dict[tuple[Component, int], Tensor] = {}
    wanted: dict[Component, tuple[Site, ...]] = {name: classifier.sites(name) for name in ("residual", *components)}
    if anatomy.final is not None:
        wanted["pooler"] = classifier.sites("pooler")
    edits: list[tuple[Site, Edit]] = [
        (site, partial(_keep, kept, (name, layer)))
        for name, sites in wanted.items()
        for layer, site in enumerate(sites)
    ]
    with (
        edited_sites(classifier.module, edits),
        _kept_outputs(classifier.module, anatomy.before) as before,
        _kept_outputs(classifier.module, anatomy.replays, without_states=True) as blocks,
    ):
        logits = classifier.forward(batch)
    features = None
    if anatomy.final is not None:
        features = classifier.readout_state(batch, wanted["pooler"][0], kept["pooler", 0])
    layers = {name: tuple(kept[name, layer] for layer in range(len(sites))) for name, sites in wanted.items()}
    states = layers.pop("residual")
    return CleanPass(batch, states, layers, logits, features, Replay(tuple(before), tuple(blocks)))


def resume(
    classifier: Classifier,
    clean: CleanPass,
    layer: int,
    states: Float[Tensor, "run token unit"] | None,
    example: Int[Tensor, "run"],
) -> Float[Tensor, "run label"]:
    """Return the logits of runs that take `states` for the output of block `layer`.

    `example[r]` says which example of the clean batch run r is about; the blocks above `layer` and the head compute on
    its inputs (masks, positions), whatever is applied to them. Layer -1, which needs no states, runs all blocks.
    """
    batch, site = clean.batch.take(example), classifier.sites()[max(layer, 0)]
    with passed_over(classifier.module, clean.replay.take(example), layer, site, states):
        return classifier.forward(batch)


def resume_layer(classifier: Classifier, component: Component, layer: int) -> int:
    """Return the last block that an edit of this site leaves as it was: where a run with that edit starts."""
    return classifier.n_layers - 1 if component == "pooler" else layer if component == "residual" else layer - 1


def _keep(kept: dict[tuple[Component, int], Tensor], place: tuple[Component, int], states: Tensor) -> None:
    # A copy: a block that works in place would change what the one before it returned.
    kept[place] = states.clone()


@contextmanager
def _kept_outputs(
    root: nn.Module, parts: Sequence[Replayable], *, without_states: bool = False
) -> Iterator[list[tuple[Replayable, Any]]]:
    """Keep what the calls of these parts return in the forward pass that follows, in their order."""
    keeper = _OutputKeeper({(part.module, part.call) for part in parts}, without_states)
    kept: list[tuple[Replayable, Any]] = []
    with ExitStack() as stack:
        for name in dict.fromkeys(part.module for part in parts):
            stack.callback(root.get_submodule(name).register_forward_hook(partial(keeper.keep, name)).remove)
        yield kept
    kept.extend((part, keeper.outputs[part.module, part.call]) for part in parts)


class _OutputKeeper:
    def __init__(self, wanted: set[tuple[str, int]], without_states: bool) -> None:
        self.wanted, self.without_states = wanted, without_states
        self.outputs: dict[tuple[str, int], Any] = {}
        self.counts: Counter[str] = Counter()

    def keep(self, name: str, _module: nn.Module, _arguments: Any, output: Any) -> None:
        call = name, self.counts[name]
        self.counts[name] += 1
        if call in self.wanted:
            output = without_hidden_states(output) if self.without_states else output
            self.outputs[call] = with_tensors(output, [tensor.clone() for tensor in tensors_in(output)])
