"""Contract checks for what others write against SYNAPSE: call them in your own tests.

```python
from synapse.testing import check_perturbation

def test_my_intervention_holds_what_every_intervention_holds():
    check_perturbation(MyIntervention(neurons, ...), classifier, inputs)
```
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synapse.data.examples import Examples
from synapse.data.inputs import identities
from synapse.errors import SynapseError
from synapse.execute.base import Counts, Done, Executor, Failed
from synapse.execute.contract import Token, Unbuildable, added, odd_refused, token
from synapse.model.classifier import Batch, Classifier, Inputs, Perturbation
from synapse.model.hooks import Site, hidden_states
from synapse.perturb.base import Intervention, intervention_from_dict
from synapse.probe.probe import Probes
from synapse.ranking.base import Evidence, RankingMethod
from synapse.types import Activations, Component

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that batches of other shapes may make."""


def check_perturbation(
    perturbation: Perturbation, classifier: Classifier, inputs: Inputs | Examples, *, tolerance: float = TOLERANCE
) -> None:
    """Check that a perturbation of activations, weights or logits holds what every perturbation holds.

    `inputs` are a few raw inputs of the classifier, three or more and best of unequal length; labelled examples where
    the perturbation asks for the classes. The clauses:

    1. it is a frozen dataclass that can be hashed;
    2. an intervention is equal to what `intervention_from_dict` makes of its `to_dict`, with JSON in between;
    3. the model comes back bitwise: weights, hooks, methods, mode and logits, also after an error inside the block,
       which goes on to the caller;
    4. the inputs are not changed, nor the states that an intervention is given;
    5. applied twice, it gives the same logits, bitwise;
    6. the logits of an example depend neither on the batch size, nor on the order, nor on padding (to `tolerance`);
    7. an intervention changes no neuron and no row that it does not declare, bitwise, and nothing below.

    Raises:
        AssertionError: a clause does not hold; the message names it.
    """
    check = _Check(perturbation, classifier, inputs, tolerance)
    _check_value(perturbation)
    if isinstance(perturbation, Intervention):
        check.serialises(perturbation)
    check.comes_off()
    check.gives_the_same_again()
    check.depends_on_the_example_alone()
    if isinstance(perturbation, Intervention):
        check.edits_what_it_declares(perturbation)


def check_ranking(
    method: RankingMethod,
    activations: Activations,
    *,
    probes: Probes | None = None,
    classifier: Classifier | None = None,
    examples: Examples | None = None,
    planted: Mapping[str, int] | None = None,
) -> None:
    """Check that a ranking method holds what every ranking method holds.

    What is given beside the method is what `synapse.rank` takes. `planted` names for some classes the unit that is
    known to carry them in every layer. The clauses:

    1. it is a frozen dataclass that can be hashed, and it has a name;
    2. its scores are finite, one for each (layer, ranking, unit), the global ranking first; so are signed ones;
    3. a class without an example scores 0 everywhere;
    4. asked twice, it gives the same scores, bitwise;
    5. the activations are not changed, and the model is left as it was, bitwise;
    6. a planted unit comes first for its class, and all of them come before any other unit over all classes.

    Raises:
        AssertionError: a clause does not hold; the message names it.
        SettingsError: the method needs something that was not given.
    """
    _check_value(method)
    demand = functools.partial(_demand, method)
    demand(bool(method.name), "has no name")
    evidence = Evidence(activations, probes, classifier, examples)
    arrays, before = _arrays(activations), None if classifier is None else _state(classifier)
    first, second = method.rank(evidence), method.rank(evidence)
    shape = (activations.n_layers, evidence.n_rankings, activations.width)
    for name, scores in (("scores", first.scores), ("signed scores", first.signed)):
        if scores is not None:
            demand(scores.shape == shape, f"gives {name} of shape {scores.shape}; {shape} was expected")
            demand(bool(np.isfinite(scores).all()), f"gives {name} that are not finite")
    absent = [1 + c for c in range(len(activations.labels)) if c not in evidence.present]
    demand(not first.scores[:, absent].any(), "gives scores to a class that has no example")
    demand(_same(first.scores, second.scores), "gives other scores when it is asked again: draw from a seed of its own")
    demand(
        all(np.array_equal(*pair) for pair in zip(arrays, _arrays(activations), strict=True)),
        "changes the activations in place",
    )
    demand(
        before is None or (classifier is not None and _state(classifier) == before),
        "does not leave the model as it was",
    )
    units = dict(planted or {})
    for layer in range(activations.n_layers):
        for label, unit in units.items():
            found = int(first.order(layer, label)[0])
            demand(found == unit, f"puts unit {found} first for {label!r} in layer {layer}; {unit} was planted")
        top = set(first.order(layer)[: len(units)].tolist())
        demand(
            top == set(units.values()),
            f"puts {sorted(top)} first in layer {layer}; {sorted(units.values())} were planted",
        )


def check_executor(executor: Executor) -> None:
    """Check that an executor, open if it has to be, holds what every executor holds.

    The clauses:

    1. every item gives one outcome, with its position and the result that a plain loop gives; no items give none;
    2. a generator is read as outcomes are taken: an endless one does no harm, nor does a map that is left half-way;
    3. an item whose work raises is a `Failed` with its position, itself and the error, and the rest is done;
    4. a recipe is built once in a process, and the work is given what that returned; another value as it is;
    5. what `build()` raises goes to the caller;
    6. it reports, in the end that all items are through.

    Raises:
        AssertionError: a clause does not hold; the message names it.
    """
    demand = functools.partial(_demand, executor)
    _runs_every_item(executor, demand)
    _reads_as_it_goes(executor, demand)
    _goes_on_after_failures(executor, demand)
    found = [outcome for outcome in executor.map(token, range(40), shared=Token()) if isinstance(outcome, Done)]
    built = {outcome.result for outcome in found}
    demand(
        len(found) == 40 and all(name and place == ran for place, name, ran in built),
        "does not give the work what the recipe builds",
    )
    demand(len(built) == len({ran for _, _, ran in built}), "builds a recipe more than once in a process")
    try:
        list(executor.map(added, [1], shared=Unbuildable()))
    except LookupError:
        return
    demand(False, "keeps what `build()` raises from the caller")


def _runs_every_item(executor: Executor, demand: Callable[[bool, str], None]) -> None:
    """Clauses 1 and 6."""
    items, reports = [(7 * i) % 200 for i in range(200)], list[Counts]()
    outcomes = list(executor.map(added, items, shared=1000, report=reports.append))
    demand(len(outcomes) >= 200, f"loses items: {len(outcomes)} outcomes of 200 items")
    demand(len(outcomes) == 200, f"gives {len(outcomes)} outcomes of 200 items: one each was expected")
    results = {outcome.position: outcome.result for outcome in outcomes if isinstance(outcome, Done)}
    for position, item in enumerate(items):
        demand(results.get(position) == 1000 + item, f"gives item {position} the result of another one")
    demand(list(executor.map(added, [], shared=0)) == [], "gives outcomes where there are no items")
    last = reports[-1] if reports else Counts()
    demand((last.done, last.failed) == (200, 0), "does not report how far it is")


def _reads_as_it_goes(executor: Executor, demand: Callable[[bool, str], None]) -> None:
    """Clause 2."""
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    outcomes = executor.map(added, endless(), shared=0)
    taken = list(itertools.islice(outcomes, 20))
    del outcomes  # left half-way
    demand(len(taken) == 20, "ends before its items do")
    demand(read < 1_000_000, f"reads {read} items of a generator of which 20 outcomes were taken")


def _goes_on_after_failures(executor: Executor, demand: Callable[[bool, str], None]) -> None:
    """Clause 3."""
    try:
        outcomes = list(executor.map(odd_refused, range(10)))
    except ValueError as error:
        clause = "raises what one item raised, in place of going on: yield a `Failed`"
        raise AssertionError(f"{type(executor).__name__} {clause}.") from error
    failed = {outcome.position: outcome for outcome in outcomes if isinstance(outcome, Failed)}
    demand(sorted(failed) == [1, 3, 5, 7, 9], f"has the items {sorted(failed)} fail; those of 1, 3, 5, 7, 9 raised")
    demand(len(outcomes) == 10, "does not go on after a failure")
    demand(all(failed[i].item == i for i in failed), "does not say which item failed")
    alike = all(isinstance(failed[i].error, ValueError) and str(failed[i].error) == f"{i} is odd" for i in failed)
    demand(alike, "does not say why an item failed, as the work said it")


def _demand(one: object, holds: bool, clause: str) -> None:
    """Raise with the name of what is checked where a clause does not hold."""
    if not holds:
        raise AssertionError(f"{type(one).__name__} {clause}.")


def _check_value(one: object) -> None:
    """Demand a frozen dataclass that can be hashed."""
    parameters = getattr(type(one), "__dataclass_params__", None)
    _demand(
        one,
        parameters is not None and parameters.frozen,
        "is no frozen dataclass: write `@dataclass(frozen=True)` above the class",
    )
    try:
        hash(one)
    except TypeError as error:
        clause = f"cannot be hashed ({error}): use numbers, strings and tuples as fields, or `eq=False`"
        raise AssertionError(f"{type(one).__name__} {clause}.") from error


def _arrays(activations: Activations) -> list[np.ndarray]:
    return [np.array(activations.values), np.array(activations.known_logits), activations.targets.copy()]


def _state(classifier: Classifier) -> tuple[str, dict[str, Any]]:
    return classifier.weights_hash(), _fittings(classifier.module)


@dataclasses.dataclass(frozen=True, eq=False)
class _Check:
    """The clauses, one method each."""

    perturbation: Perturbation
    classifier: Classifier
    inputs: Inputs | Examples
    tolerance: float

    def demand(self, holds: bool, clause: str) -> None:
        """Raise with the name of the perturbation where a clause does not hold."""
        _demand(self.perturbation, holds, clause)

    def serialises(self, intervention: Intervention) -> None:
        """Clause 2."""
        try:
            again = intervention_from_dict(json.loads(json.dumps(intervention.to_dict(), allow_nan=False)))
        except (SynapseError, TypeError, ValueError) as error:
            raise AssertionError(
                f"{type(intervention).__name__} does not serialise: its fields must be plain numbers, strings and "
                f"tuples ({error})."
            ) from error
        self.demand(
            again == intervention and hash(again) == hash(intervention),
            "is another one after `to_dict` and `intervention_from_dict`",
        )

    def comes_off(self) -> None:
        """Clause 3, and of clause 4 what concerns the inputs."""
        classifier, asked = self.classifier, list(identities(self._inputs()))
        clean, before, weights = self._logits(), _fittings(classifier.module), classifier.weights_hash()
        with classifier.edited(self.perturbation):
            self._logits()
        self.demand(list(identities(self._inputs())) == asked, "changes the inputs in place")
        self._is_as_before("after the block", clean, before, weights)
        swallowed = False
        try:
            with classifier.edited(self.perturbation):
                self._logits()
                raise _PlannedError
            swallowed = True
        except _PlannedError:
            pass
        self.demand(not swallowed, "keeps an error inside the block from the caller: do not catch it, use `finally`")
        self._is_as_before("after an error inside the block", clean, before, weights)

    def _is_as_before(self, when: str, clean: np.ndarray, before: dict[str, Any], weights: str) -> None:
        module = self.classifier.module
        self.demand(self.classifier.weights_hash() == weights, f"leaves other weights behind {when}")
        now = _fittings(module)
        left = next((name for name in now | before if now.get(name) != before.get(name)), "")
        where = f"{left!r}" if left else "the model itself"
        self.demand(now == before, f"leaves a hook, a method or a mode behind on {where} {when}")
        self.demand(_same(self._logits(), clean), f"leaves other logits behind {when}")

    def gives_the_same_again(self) -> None:
        """Clause 5."""
        self.demand(
            _same(self._edited_logits(), self._edited_logits()),
            "gives other logits when it is applied again: draw what is random from a seed of its own",
        )

    def depends_on_the_example_alone(self) -> None:
        """Clause 6."""
        logits, n = self._edited_logits(), len(self._inputs())
        order = np.arange(n)[::-1]
        backwards = np.empty_like(logits)
        backwards[order] = self._edited_logits(order)
        self._agree(backwards, logits, "the order of the examples")
        alone = np.concatenate([self._edited_logits(np.array([one])) for one in range(n)])
        self._agree(alone, logits, "which examples share a batch, or their padding")
        most = self.classifier.max_tokens
        try:
            self.classifier.max_tokens = 1
            small = self._edited_logits()
        finally:
            self.classifier.max_tokens = most
        self._agree(small, logits, "the batch size")

    def _agree(self, other: np.ndarray, logits: np.ndarray, what: str) -> None:
        finite = np.isfinite(logits)
        apart = np.abs(np.where(finite, other - logits, 0)).max(initial=0)
        most = self.tolerance * (1 + np.abs(logits[finite]).max(initial=0))
        self.demand(
            bool((np.isfinite(other) == finite).all()) and bool(apart <= most),
            f"depends on {what}: logits differ by {apart:.1e}, at most {most:.0e} was expected",
        )

    def edits_what_it_declares(self, intervention: Intervention) -> None:
        """Clause 7, and of clause 4 what concerns the states."""
        classifier, neurons = self.classifier, intervention.neurons
        sites = classifier.sites(neurons.component)
        last = len(sites) if intervention.scope == "readout-onward" else neurons.layer + 1
        for batch in self._batches():
            clean, seen = _Watch(classifier, batch), _Watch(classifier, batch)
            with clean.before_edits():
                classifier.forward(batch)
            with seen.before_edits(), classifier.edited(intervention), seen.after_edits():
                classifier.forward(batch)
            for (component, layer), site in seen.sites.items():
                before, where = seen.before(site), f"the {component!r} states of layer {layer}"
                if component == neurons.component and layer <= neurons.layer:
                    is_untouched = not _changed(before, clean.before(site)).any()
                    self.demand(is_untouched, f"changes {where} before its own edit, where nothing was to change yet")
                self.demand(not seen.is_overwritten(site), f"changes {where} in place: clone what you are given")
                changed = _changed(before, seen.after(site))
                if site not in sites[neurons.layer : last]:
                    self.demand(not changed.any(), f"edits {where}, which it does not declare")
                    continue
                rows = classifier.rows(batch, site, before.shape[1], intervention.scope)
                if rows is not None:
                    self.demand(not changed[~rows.cpu()].any(), f"edits rows of {where} that it does not declare")
                changed[..., list(neurons.units)] = False
                self.demand(not changed.any(), f"edits neurons of {where} that it does not declare")

    def _inputs(self) -> Inputs:
        return self.inputs.inputs if isinstance(self.inputs, Examples) else self.inputs

    def _batches(self) -> Iterator[Batch]:
        targets = self.inputs.targets(self.classifier.labels) if isinstance(self.inputs, Examples) else None
        return self.classifier.batches(self._inputs(), targets)

    def _logits(self, chosen: np.ndarray | None = None) -> Float[np.ndarray, "example label"]:
        if chosen is None:
            return self.classifier.predict(self.inputs)
        if isinstance(self.inputs, Examples):
            return self.classifier.predict(self.inputs.take(chosen))
        given = self.inputs
        return self.classifier.predict(given[chosen] if isinstance(given, np.ndarray) else [given[i] for i in chosen])

    def _edited_logits(self, chosen: np.ndarray | None = None) -> Float[np.ndarray, "example label"]:
        with self.classifier.edited(self.perturbation):
            return self._logits(chosen)


class _PlannedError(Exception):
    """The error that is raised inside a block on purpose."""


# ------------------------------------------------------------------------------------ plain hooks, and what they see


@dataclasses.dataclass(eq=False)
class _Calls:
    """What passed one side of one module in a forward pass, call by call, before and after edits."""

    given: list[Tensor] = dataclasses.field(default_factory=list)
    before: list[Tensor] = dataclasses.field(default_factory=list)
    after: list[Tensor] = dataclasses.field(default_factory=list)
    overwritten: list[bool] = dataclasses.field(default_factory=list)

    def see_before(self, values: Tensor) -> None:
        """Keep the tensor itself and a copy of it."""
        self.given.append(values)
        self.before.append(values.detach().clone())

    def see_after(self, values: Tensor) -> None:
        """Keep a copy, and whether the tensor that the edits were given is still what it was."""
        call = len(self.after)
        self.after.append(values.detach().clone())
        self.overwritten.append(bool(_changed(self.given[call], self.before[call]).any()))


class _Watch:
    """Plain hooks on the sites of every component, apart from the ones that edit."""

    def __init__(self, classifier: Classifier, batch: Batch) -> None:
        self.classifier = classifier
        self.n_examples = len(batch.keys)
        self.sites: dict[tuple[Component, int], Site] = {
            (component, layer): site
            for component, sites in classifier.anatomy.sites.items()
            for layer, site in enumerate(sites)
        }
        self.calls = {_side(site): _Calls() for site in self.sites.values()}

    @contextmanager
    def before_edits(self) -> Iterator[None]:
        """See what comes to the sites; hooks run in the order in which they are registered, so enter this first."""
        with self._hooked("see_before"):
            yield

    @contextmanager
    def after_edits(self) -> Iterator[None]:
        """See what leaves the sites; enter this last."""
        with self._hooked("see_after"):
            yield

    def before(self, site: Site) -> Float[Tensor, "example token unit"]:
        """Return what came to a site."""
        return self._rows(site, self.calls[_side(site)].before)

    def after(self, site: Site) -> Float[Tensor, "example token unit"]:
        """Return what left a site."""
        return self._rows(site, self.calls[_side(site)].after)

    def is_overwritten(self, site: Site) -> bool:
        """Return whether what came to a site was changed in place."""
        calls = self.calls[_side(site)].overwritten
        return calls[self._position(site, len(calls))]

    def _rows(self, site: Site, values: Sequence[Tensor]) -> Float[Tensor, "example token unit"]:
        return site.rows_first(values[self._position(site, len(values))], self.n_examples).cpu()

    def _position(self, site: Site, n_calls: int) -> int:
        """Return which of the module's calls in the pass is the site; every call of a block makes equally many."""
        if site.within is None:
            return site.call
        block, call = site.within
        return call * (n_calls // self.classifier.anatomy.blocks.count(block)) + site.call

    @contextmanager
    def _hooked(self, see: str) -> Iterator[None]:
        with ExitStack() as stack:
            for (name, side, argument), calls in self.calls.items():
                module, keep = self.classifier.module.get_submodule(name), getattr(calls, see)
                if side == "output":
                    handle = module.register_forward_hook(functools.partial(_see_output, keep))
                else:
                    handle = module.register_forward_pre_hook(
                        functools.partial(_see_input, keep, argument), with_kwargs=True
                    )
                stack.callback(handle.remove)
            yield


def _see_output(keep: Callable[[Tensor], None], _module: nn.Module, _arguments: Any, output: Any) -> None:
    keep(hidden_states(output))


def _see_input(
    keep: Callable[[Tensor], None], argument: int | str, _module: nn.Module, arguments: Any, options: Any
) -> None:
    keep(options[argument] if isinstance(argument, str) else arguments[argument])


def _side(site: Site) -> tuple[str, str, int | str]:
    return site.module, site.side, site.argument


def _fittings(module: nn.Module) -> dict[str, Any]:
    """Return by module what is fitted to it: hooks, methods put in place of its own, its mode."""
    return {
        name: (
            {kind: tuple(hooks) for kind, hooks in vars(part).items() if kind.endswith("_hooks") and hooks},
            vars(part).get("forward"),
            part.training,
            tuple(parameter.requires_grad for parameter in part.parameters(recurse=False)),
        )
        for name, part in module.named_modules()
    }


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit, NaN included."""
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _changed(one: Tensor, other: Tensor) -> Bool[Tensor, "*shape"]:
    """Return which numbers differ in any bit."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    differs: Tensor = one.contiguous().view(whole) != other.contiguous().view(whole)
    return differs
