"""Run edited copies of examples, computing only what their edits change.

One clean pass of a batch keeps the output of every block, of what runs before them, and what their attention looks at.
Then, for many edited copies (*runs*) at once:

- what lies below the first edit is given again, not computed (*prefix*);
- in the last block, and in every block of a causal decoder, only the row that the head reads is computed; the others
  are there as keys and values (*rows*);
- where an edit of that row meets a block that mixes it into all others, the projections of the other rows are given
  again;
- behind the last block only the head runs, on one row a run.

The model's own code does all of it: modules that need not run are stood in for, and the attention is handed keys and
values of rows that are not computed. Nothing here knows an architecture.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.model.attention import (
    Attended,
    BlockAttention,
    Slots,
    attention_kept,
    attention_of_one_row,
    ended_at_attention,
)
from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import Edit, Site, edited_sites, ended_at, shortened, standing_in, without_hidden_states
from synapse.model.trace import Replay, Replayable, passed_over, tensors_in, with_tensors
from synapse.types import Component

Reuse = Literal["rows", "prefix", "none"]
"""What of a clean pass runs take over: `prefix`, what lies below their edits; `rows`, also the rows and blocks that
these do not reach; `none`, nothing."""


@dataclass(frozen=True, eq=False)
class CleanPass:
    """What one unperturbed forward pass of a batch gave.

    `states[l]` is the output of block l, (example, token, unit); `others` holds the states of other components that
    were asked for; `features` the input of the final linear map at the readout row. `inside[component][l]` is what runs
    in block l before the component is reached; `unmixed[l]` what the maps gave that see each row of block l's input
    alone; `attention[l]` the attention of block l, None where it was not seen. `row` is the one row of every example
    that the head reads, None where it reads several.
    """

    batch: Batch
    states: tuple[Tensor, ...]
    others: Mapping[Component, tuple[Tensor, ...]]
    logits: Float[Tensor, "example label"]
    features: Float[Tensor, "example feature"] | None
    replay: Replay
    inside: Mapping[Component, tuple[Replay, ...]]
    unmixed: tuple[tuple[tuple[Site, Tensor], ...], ...]
    attention: tuple[BlockAttention | None, ...]
    row: Int[Tensor, "example"] | None

    @property
    def n_tokens(self) -> int:
        """Number of token rows, padding included."""
        return int(self.states[0].shape[1])

    def of(self, component: Component) -> tuple[Tensor, ...]:
        """Return the states of a component, one tensor (example, token, unit) a layer."""
        return self.states if component == "residual" else self.others[component]

    def attended(self, layer: int) -> Attended:
        """Return what the readout row of every example looks at in a block."""
        if layer not in self._attended:  # in encoders only the last block is asked for
            block = self.attention[layer]
            assert block is not None
            assert self.row is not None
            self._attended[layer] = block.at(self.row)
        return self._attended[layer]

    @cached_property
    def _attended(self) -> dict[int, Attended]:
        return {}

    @property
    def head_reads_one_row(self) -> bool:
        """Whether the head can be run on the row that it reads, without the others."""
        return self.row is not None and bool(self.replay.blocks)

    @property
    def knows_rows(self) -> bool:
        """Whether the last block can be run on that row too."""
        return self.head_reads_one_row and self.attention[-1] is not None

    @cached_property
    def query_map(self) -> tuple[Site, int] | None:
        """The map of the last block that gives its attention the queries and nothing else, and their width; if there is
        one."""
        last = self.attention[-1]
        if last is None or not self.unmixed:
            return None
        of_queries, *of_others = (_place(tensor) for tensor in (last.call.query, last.call.key, last.call.value))
        names = [site.module for sites in self.unmixed for site, _ in sites]
        for site, values in self.unmixed[-1]:
            is_shared = names.count(site.module) > 1  # by blocks, or called more than once
            if _place(values) == of_queries and of_queries not in of_others and not is_shared:
                return site, int(values.shape[-1])
        return None

    @cached_property
    def row_is_alone_from(self) -> int:
        """First block from which on an edit of the readout row at its input moves the head by way of that row alone.

        Read off the attention: an edit spreads to the rows that look at an edited one; as long as none of those is
        looked at by the readout row, they are nothing to the head. In causal decoders this is block 0.
        """
        n_layers = len(self.states)
        if self.row is None or self.attention[-1] is None:
            return n_layers
        return 0 if self._spreads_to_nobody() else n_layers - 1

    def _spreads_to_nobody(self) -> bool:
        assert self.row is not None
        example = torch.arange(len(self.row), device=self.row.device)
        edited = torch.zeros(len(self.row), self.n_tokens, dtype=torch.bool, device=self.row.device)
        edited[example, self.row] = True
        for block in self.attention:
            if block is None:
                return False
            looks = block.looks.expand(len(self.row), -1, -1)
            if bool(((looks[example, self.row] & edited).sum(dim=1) > 1).any()):
                return False
            edited = edited | (looks & edited[:, None]).any(dim=2)
        return True


def clean_pass(
    classifier: Classifier, batch: Batch, components: Sequence[Component] = (), *, reuse: Component | None = None
) -> CleanPass:
    """Return the block outputs of one unperturbed forward pass, and the states of further components.

    With `reuse` also what runs with edits of that component can take over.
    """
    anatomy, module = classifier.anatomy, classifier.module
    kept: dict[tuple[Component, int], Tensor] = {}
    wanted: dict[Component, tuple[Site, ...]] = {name: classifier.sites(name) for name in ("residual", *components)}
    if anatomy.final is not None:
        wanted["pooler"] = classifier.sites("pooler")
    edits: list[tuple[Site, Edit]] = [
        (site, partial(_keep, kept, (name, layer)))
        for name, sites in wanted.items()
        for layer, site in enumerate(sites)
    ]
    unmixed: dict[tuple[int, int], Tensor] = {}
    inside: list[list[tuple[Replayable, Any]]] = []
    attention: list[BlockAttention | None] = [None] * classifier.n_layers
    with ExitStack() as stack:
        stack.enter_context(edited_sites(module, edits))
        before = stack.enter_context(_kept_outputs(module, anatomy.before))
        blocks = stack.enter_context(_kept_outputs(module, anatomy.replays, without_states=True))
        if reuse is not None:
            looks: list[tuple[Site, Edit]] = [
                (site, partial(_look, unmixed, (layer, position)))
                for layer, sites in enumerate(anatomy.unmixed)
                for position, site in enumerate(sites)
            ]
            stack.enter_context(edited_sites(module, looks))
            inside = [stack.enter_context(_kept_outputs(module, parts)) for parts in anatomy.inside.get(reuse, ())]
            attention = stack.enter_context(attention_kept(module, anatomy.blocks, len(batch.index)))
        logits = classifier.forward(batch)
    features = None
    if anatomy.final is not None:
        features = classifier.readout_state(batch, wanted["pooler"][0], kept["pooler", 0])
    layers = {name: tuple(kept[name, layer] for layer in range(len(sites))) for name, sites in wanted.items()}
    states = layers.pop("residual")
    return CleanPass(
        batch,
        states,
        layers,
        logits,
        features,
        Replay(tuple(before), tuple(blocks) if len(blocks) == len(anatomy.replays) else ()),
        {} if reuse is None else {reuse: tuple(Replay(tuple(parts), ()) for parts in inside)},
        tuple(
            tuple(
                (site, unmixed[layer, position]) for position, site in enumerate(sites) if (layer, position) in unmixed
            )
            for layer, sites in enumerate(anatomy.unmixed)
        ),
        tuple(attention),
        classifier.readout_row(batch, states[0].shape[1]),
    )


@dataclass(frozen=True, eq=False)
class Runs:
    """Edited copies of examples of a clean batch: run r is about example `example[r]`.

    `edits` change what passes the sites of their component, by layer; `layer` is the first of them. `in_readout_row`
    says that they change the readout row alone.
    """

    component: Component
    layer: int
    edits: Mapping[int, Edit]
    example: Int[Tensor, "run"]
    in_readout_row: bool


def runs_in_one_row(
    classifier: Classifier, clean: CleanPass, component: Component, layer: int, *, in_readout_row: bool
) -> bool:
    """Return whether runs that begin with an edit of this site need, from there on, the readout row alone."""
    last, below = classifier.n_layers - 1, resume_layer(classifier, component, layer)
    if below == last or not clean.knows_rows:
        return below == last and clean.head_reads_one_row
    # Behind the attention of the last block rows are not mixed again.
    is_behind = below == last - 1 and component != "residual"
    return is_behind or (in_readout_row and below + 1 >= clean.row_is_alone_from)


def run_logits(
    classifier: Classifier, clean: CleanPass, runs: Runs, reuse: Reuse = "rows"
) -> Float[Tensor, "run label"]:
    """Return the logits of runs, with what they take over of the clean pass.

    Raises:
        Exception: whatever the model's own code raises when it is given single rows that it cannot work on.
    """
    return _Resumption(classifier, clean, runs, reuse).logits()


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


@dataclass(frozen=True, eq=False)
class _Resumption:
    """One pass, or a few short ones, that give the logits of runs."""

    classifier: Classifier
    clean: CleanPass
    runs: Runs
    reuse: Reuse

    def logits(self) -> Float[Tensor, "run label"]:
        clean, runs, below = self.clean, self.runs, self.below
        if self.reuse == "none":
            return self._resumed(-1, None)
        is_alone = runs_in_one_row(
            self.classifier, clean, runs.component, runs.layer, in_readout_row=runs.in_readout_row
        )
        if self.reuse == "rows" and is_alone:
            return self._in_one_row(below, self._clean_rows(below))
        if self.reuse == "prefix" or not clean.knows_rows:
            return self._resumed(below, self._clean_states(below))
        if self.is_inner and runs.in_readout_row and clean.attention[runs.layer] is not None:
            # Inside its own block the edit stays in its row.
            states = clean.states[runs.layer][runs.example]
            states[self._run, self._row] = self._rows_after(runs.layer, below)
            return self._through_all_rows(runs.layer, states, edits_from=runs.layer + 1)
        return self._through_all_rows(below, self._clean_states(below))

    @property
    def is_inner(self) -> bool:
        return self.runs.component not in ("residual", "pooler")

    @property
    def below(self) -> int:
        return resume_layer(self.classifier, self.runs.component, self.runs.layer)

    @property
    def _run(self) -> Int[Tensor, "run"]:
        return torch.arange(len(self.runs.example), device=self.runs.example.device)

    @cached_property
    def _row(self) -> Int[Tensor, "run"]:
        assert self.clean.row is not None
        return self.clean.row[self.runs.example]

    def _clean_states(self, layer: int) -> Float[Tensor, "run token unit"] | None:
        return None if layer < 0 else self.clean.states[layer][self.runs.example]

    def _clean_rows(self, layer: int) -> Float[Tensor, "run 1 unit"] | None:
        return None if layer < 0 else self.clean.states[layer][self.runs.example, self._row].unsqueeze(1)

    @contextmanager
    def _edited(self, first: int, last: int) -> Iterator[None]:
        """Apply the edits of the layers from `first` to `last`."""
        sites = self.classifier.sites(self.runs.component)
        edits = [(sites[layer], edit) for layer, edit in self.runs.edits.items() if first <= layer <= last]
        with edited_sites(self.classifier.module, edits):
            yield

    def _resumed(self, layer: int, states: Tensor | None) -> Float[Tensor, "run label"]:
        """Return the logits from the block `layer` on, all rows of all blocks."""
        with self._edited(0, self.classifier.n_layers), self._prefix_of_block(layer + 1):
            return resume(self.classifier, self.clean, layer, states, self.runs.example)

    @contextmanager
    def _prefix_of_block(self, layer: int) -> Iterator[None]:
        """Give again what runs in a block before the site that is edited, if it lies in it."""
        inside = self.clean.inside.get(self.runs.component, ())
        if self.reuse == "none" or not inside or layer != self.runs.layer or not self.clean.replay.blocks:
            yield
            return
        outputs = inside[layer].take(self.runs.example).up_to(-1, None)
        with standing_in(self.classifier.module, outputs):
            yield

    def _through_all_rows(
        self, layer: int, states: Tensor | None, *, edits_from: int = 0
    ) -> Float[Tensor, "run label"]:
        """Return the logits of runs whose edits reach rows other than the readout's.

        All rows up to the last block, of which keys and values are computed for all of them, the rest for one.
        """
        classifier, last = self.classifier, self.classifier.n_layers - 1
        root, blocks, below = classifier.module, classifier.anatomy.blocks, classifier.sites()[last - 1]
        reached: list[Tensor] = []
        with (
            ended_at_attention(root, blocks, last) as seen,
            self._edited(edits_from, classifier.n_layers),
            self._prefix_of_block(layer + 1),
            self._unmixed_again(layer + 1),
            self._without_queries(),
            # Behind the edits: what the last block is given.
            edited_sites(root, [(below, partial(_append, reached))]),
        ):
            resume(classifier, self.clean, layer, states, self.runs.example)
        bias = _of_examples(self.clean.attended(last).bias, self.runs.example)
        attended = replace(BlockAttention(seen[0]).at(self._row), bias=bias)
        rows = reached[-1][self._run, self._row].unsqueeze(1)
        return self._in_one_row(last - 1, rows, edits_from=last, attended={last: attended}.__getitem__)

    @contextmanager
    def _unmixed_again(self, layer: int) -> Iterator[None]:
        """Give again what the maps of a block give that see each row alone, for the rows that are not edited."""
        is_row = self.runs.in_readout_row and (not self.is_inner or self.runs.layer < layer)
        with ExitStack() as stack:
            if is_row and layer < self.classifier.n_layers - 1:
                for site, values in self.clean.unmixed[layer]:
                    again = _RowAgain(self._run, self._row, values[self.runs.example])
                    stack.enter_context(shortened(self.classifier.module, site.module, again.output))
            yield

    @contextmanager
    def _without_queries(self) -> Iterator[None]:
        """Leave out the map of the last block that gives nothing but the queries of all rows."""
        with ExitStack() as stack:
            if self.clean.query_map is not None:
                site, width = self.clean.query_map
                stack.enter_context(shortened(self.classifier.module, site.module, partial(_unfilled, width)))
            yield

    def _in_one_row(
        self,
        layer: int,
        rows: Float[Tensor, "run 1 unit"] | None,
        *,
        edits_from: int = 0,
        attended: Callable[[int], Attended] | None = None,
    ) -> Float[Tensor, "run label"]:
        """Return the logits from one row a run after block `layer`, among the clean pass's rows or those given."""
        with self._edited(edits_from, self.classifier.n_layers):
            return self._forward_of_rows(layer, rows, attended)

    def _rows_after(self, layer: int, below: int) -> Float[Tensor, "run unit"]:
        """Return the readout rows after a block, edited there, with the rows after `below` as they were."""
        root, site = self.classifier.module, self.classifier.sites()[layer]
        with ended_at(root, site) as states, self._edited(0, layer):
            self._forward_of_rows(below, self._clean_rows(below), None)
        return states[0][:, 0]

    def _forward_of_rows(
        self, layer: int, rows: Float[Tensor, "run 1 unit"] | None, attended: Callable[[int], Attended] | None
    ) -> Float[Tensor, "run label"]:
        classifier, clean = self.classifier, self.clean
        assert clean.row is not None
        slots = Slots.of(self.runs.example, clean.row) if attended is None else None
        replay = clean.replay.take_rows(self.runs.example, self._row)
        batch = _one_row(clean.batch.take(self.runs.example), self._row, classifier.anatomy.inputs_with_rows)
        with (
            passed_over(classifier.module, replay, layer, classifier.sites()[max(layer, 0)], rows),
            attention_of_one_row(
                classifier.module, classifier.anatomy.blocks, clean.attended if attended is None else attended, slots
            ),
        ):
            return classifier.forward(batch)


def _unfilled(width: int, _forward: Any, states: Tensor) -> Tensor:
    return states.new_empty(*states.shape[:-1], width)


@dataclass(frozen=True, eq=False)
class _RowAgain:
    """What a map gives when one row of what it is given has changed; `values` is what it gave before."""

    run: Int[Tensor, "run"]
    row: Int[Tensor, "run"]
    values: Float[Tensor, "run token unit"]

    def output(self, compute: Any, states: Tensor) -> Tensor:
        self.values[self.run, self.row] = compute(states[self.run, self.row].unsqueeze(1))[:, 0]
        return self.values


def _one_row(batch: Batch, row: Int[Tensor, "run"], with_rows: frozenset[str]) -> Batch:
    """Return the batch with one row of each example in place of all, in the inputs that have an entry for every row."""
    run = torch.arange(len(row), device=row.device)
    return Batch(
        batch.index,
        batch.keys,
        {name: value[run, row].unsqueeze(1) if name in with_rows else value for name, value in batch.inputs.items()},
        batch.labels,
    )


def _place(tensor: Tensor) -> int:
    """Return where the numbers of a tensor lie: a view lies where what it shows does."""
    return tensor.untyped_storage().data_ptr()


def _of_examples(tensor: Tensor, example: Int[Tensor, "run"]) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[example]


def _append(kept: list[Tensor], states: Tensor) -> None:
    kept.append(states)


def _look(kept: dict[tuple[int, int], Tensor], place: tuple[int, int], states: Tensor) -> None:
    kept[place] = states


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
    # What did not run in this pass (a mask that is made only where there is padding) is not given again either.
    kept.extend(
        (part, keeper.outputs[part.module, part.call]) for part in parts if (part.module, part.call) in keeper.outputs
    )


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
