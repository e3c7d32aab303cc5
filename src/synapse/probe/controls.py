"""Control tasks, and what probes are worth beside them.

A probe may be accurate because it is a capable learner, and not because the layer says anything of the task.
The control task of Hewitt & Liang (EMNLP 2019) gives each *type* of input a random label, the same in train
and test; its accuracy is what the probe can learn by heart, and

    selectivity = accuracy - control accuracy.

Types must recur: whole inputs are all different, and a random label for each says nothing about the test
part. Here a type is a k-means cell of the inputs themselves, found without the model.

Three more controls each take something else away, and selectivity against them is the same difference:

| control | what is taken away | how |
|---|---|---|
| `shuffled` | what the labels have to do with the inputs | `shuffled_targets`; what is left is what guessing is worth |
| `untrained` | what the model has learned | `synapse.recording.record_untrained` |
| `random-units` | what the ranking knows | `refit_on` the top units of a ranking, and as many random ones |

All of them are laid beside the probe by `compare_with_control`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.cluster import KMeans
from sklearn.metrics import f1_score
from threadpoolctl import threadpool_limits

from synapse.data.examples import Examples
from synapse.errors import DataError, SettingsError, SplitError
from synapse.probe.places import input_places
from synapse.probe.probe import Probes, probe_targets, refit_probes
from synapse.types import Activations, Neurons

TYPES = 50
"""Number of input types unless told otherwise."""


def input_types(
    train: Examples, test: Examples, *, types: int = TYPES, seed: int = 0
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]:
    """Return the type of every train and every test input, from 0; every type occurs in train.

    The cells are those of k-means on the train part, where `input_places` puts its inputs: by their words, ids or
    values, whatever their kind. There are at most `types` cells, and at most one for every four train examples.

    Raises:
        DataError: train and test are not of one kind and shape, a file cannot be read, or the train inputs are all
            alike.
        SettingsError: `types` is below 2.
    """
    if types < 2:
        raise SettingsError(f"{types} input types were asked for: ask for at least 2.")
    places_train, places_test = input_places(train, test, seed=seed)
    # Rounded, as equal inputs may come to lie a rounding error apart.
    distinct = len(np.unique(np.round(places_train, 9), axis=0))
    cells = min(types, len(train) // 4, distinct)
    if cells < 2:
        raise DataError(
            f"The {len(train)} inputs of {train.name} are too few or too much alike to be sorted into types: "
            "give at least 8 examples that differ."
        )
    with threadpool_limits(limits=1):  # sums over threads would differ from machine to machine
        means = KMeans(cells, n_init=3, random_state=seed).fit(places_train)
        found, train_types = np.unique(means.labels_, return_inverse=True)
        test_types = np.searchsorted(found, means.predict(places_test))
    return train_types.astype(np.int64), test_types.astype(np.int64)


def control_targets(
    train_types: Int[np.ndarray, "train"],
    test_types: Int[np.ndarray, "test"],
    train_targets: Int[np.ndarray, "example"],
    *,
    seed: int = 0,
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "test"]]:
    """Return the control task's targets: for each type one random label, drawn from those of `train_targets`.

    At least two labels occur in train.

    Raises:
        DataError: there is only one type, or only one label.
    """
    found_types, found_labels = len(np.unique(train_types)), len(np.unique(train_targets))
    if found_types < 2 or found_labels < 2:
        raise DataError(
            f"Train has {found_types} types of input and {found_labels} labels: "
            "a control task needs at least two of each, so give examples that differ."
        )
    n_types = int(max(train_types.max(), test_types.max())) + 1
    label_of = np.random.default_rng(seed).choice(train_targets, size=n_types)
    if len(np.unique(label_of[train_types])) < 2:
        others = train_targets[train_targets != label_of[train_types[0]]]
        label_of[train_types[0]] = np.bincount(others).argmax()
    return label_of[train_types], label_of[test_types]


@dataclass(frozen=True, eq=False)
class ProbeEvaluation:
    """What the probe of one layer, and its control probe, said of each test example."""

    layer: int
    predictions: Int[np.ndarray, "example"]
    targets: Int[np.ndarray, "example"]
    control_predictions: Int[np.ndarray, "example"]
    control_targets: Int[np.ndarray, "example"]
    model_predictions: Int[np.ndarray, "example"]
    """What the classifier itself said."""
    penalty: float
    gradient_norm: float
    nonzero_units: int
    """Units with a weight other than 0 for some label."""
    predicted_model: Int[np.ndarray, "example"] | None = None
    """What a probe that was fitted to the classifier's own predictions said, where there is one."""

    @property
    def correct(self) -> Bool[np.ndarray, "example"]:
        """Whether the probe met the target."""
        return np.asarray(self.predictions == self.targets)

    @property
    def control_correct(self) -> Bool[np.ndarray, "example"]:
        """Whether the control probe met the control target."""
        return np.asarray(self.control_predictions == self.control_targets)

    @property
    def agrees(self) -> Bool[np.ndarray, "example"]:
        """Whether the probe says what the classifier says."""
        return np.asarray(self.predictions == self.model_predictions)

    def outcomes(self) -> dict[str, Float[np.ndarray, "example"]]:
        """Return the measures that are means over examples, as the values to be averaged, by name.

        `selectivity` is the difference of the two probes on the same example, so its interval is paired.
        """
        correct, control_correct = self.correct.astype(np.float64), self.control_correct.astype(np.float64)
        found = {
            "accuracy": correct,
            "control_accuracy": control_correct,
            "selectivity": correct - control_correct,
            "model_agreement": self.agrees.astype(np.float64),
        }
        if self.predicted_model is not None:
            found["model_accuracy"] = (self.predicted_model == self.model_predictions).astype(np.float64)
        return found

    def values(self) -> dict[str, float]:
        """Return every measure of the probe table by name."""
        return {
            **{name: float(values.mean()) for name, values in self.outcomes().items()},
            "macro_f1": float(f1_score(self.targets, self.predictions, average="macro", zero_division=0.0)),
            "penalty": self.penalty,
            "gradient_norm": self.gradient_norm,
            "nonzero_units": float(self.nonzero_units),
        }


def evaluate_probes(
    probes: Probes,
    controls: Probes,
    activations: Activations,
    targets: Int[np.ndarray, "example"],
    of_model: Probes | None = None,
) -> tuple[ProbeEvaluation, ...]:
    """Return one evaluation a layer on test activations; `targets` are the control targets of the test part.

    `of_model` are probes fitted to the classifier's own predictions: what a layer holds of the labels then stands
    beside what it holds of the decision.

    Raises:
        SplitError: the probes were fitted on these very examples.
        DataError: labels or number of layers are not those of the probes.
    """
    _check_evaluated(probes, activations)
    return tuple(
        ProbeEvaluation(
            layer=probe.layer,
            predictions=probe.predict(activations.values[probe.layer]),
            targets=probe_targets(activations, probes.target),
            control_predictions=controls[probe.layer].predict(activations.values[probe.layer]),
            control_targets=targets,
            model_predictions=probe_targets(activations, "model"),
            penalty=probe.penalty,
            gradient_norm=probe.gradient_norm,
            nonzero_units=int(np.any(probe.weights != 0.0, axis=0).sum()),
            predicted_model=None
            if of_model is None
            else of_model[probe.layer].predict(activations.values[probe.layer]),
        )
        for probe in probes.probes
    )


def shuffled_targets(targets: Int[np.ndarray, "example"], *, seed: int = 0) -> Int[np.ndarray, "example"]:
    """Return the targets in random order: every label as often as before, and on no example for a reason."""
    return np.asarray(np.random.default_rng(seed).permutation(targets))


def refit_on(
    probes: Probes,
    activations: Activations,
    neurons: Sequence[Neurons],
    targets: Int[np.ndarray, "example"] | None = None,
) -> Probes:
    """Return probes that see only some units of each layer, at the penalties of `probes`: a k-sparse refit.

    `neurons` is one set for each layer, in order: `ranking.top(k, layer=l)`, or `ranking.random(k, layer=l, seed=s)` as
    the control of that. The probes take states of the full width, and their weights on all other units are 0.

    Raises:
        SettingsError: the sets are not one for each layer of the component, or name units that are not there.
        ConvergenceError, DataError: as `fit_probes`.

    *Source*: Gurnee et al. (2023), arXiv 2305.01610.
    """
    layers, component, width = list(range(activations.n_layers)), activations.component, activations.width
    if [chosen.layer for chosen in neurons] != layers or {chosen.component for chosen in neurons} != {component}:
        seen = ", ".join(f"{chosen.component} {chosen.layer}" for chosen in neurons) or "no layer"
        raise SettingsError(
            f"Units of {seen} were given: give one set for each of the layers 0 to {layers[-1]} of {component}, in "
            "order."
        )
    values = np.zeros(activations.values.shape, dtype=activations.values.dtype)
    for chosen in neurons:
        units = np.array(chosen.units, dtype=np.int64)
        if ((units < 0) | (units >= width)).any():
            raise SettingsError(f"Layer {chosen.layer} has no unit {units.max()}: its units are 0 to {width - 1}.")
        values[chosen.layer][:, units] = activations.values[chosen.layer][:, units]
    # To a probe, a unit that is constant is not there.
    return refit_probes(probes, replace(activations, values=values), targets)


@dataclass(frozen=True, eq=False)
class ControlComparison:
    """What the probe of one layer gets right, beside what a control gets right of the same test examples."""

    control: str
    layer: int
    correct: Bool[np.ndarray, "example"]
    control_correct: Float[np.ndarray, "example"]
    """Share of the control's draws that are right, in [0, 1]."""

    def outcomes(self) -> dict[str, Float[np.ndarray, "example"]]:
        """Return the control's accuracy and the selectivity against it, as values to be averaged over examples.

        Selectivity is the difference on the same example, in [-1, 1], so its interval is paired.
        """
        selectivity = self.correct.astype(np.float64) - self.control_correct
        return {f"{self.control}_accuracy": self.control_correct, f"{self.control}_selectivity": selectivity}


def compare_with_control(
    control: str,
    probes: Probes,
    activations: Activations,
    controls: Sequence[Probes],
    *,
    control_activations: Activations | None = None,
    control_targets: Int[np.ndarray, "example"] | Int[np.ndarray, "draw example"] | None = None,
) -> tuple[ControlComparison, ...]:
    """Return for each layer what probes get right on test activations, beside one or more draws of a control.

    `controls` are the control's probes, one a draw. `control_activations` is what they read, by default the same
    `activations`; they must be of the same examples. `control_targets` is what they should say, for all draws or for
    each, by default the probes' own targets.

    Raises:
        SplitError: probes were fitted on these very examples.
        DataError: labels, number of layers or examples do not fit.
        SettingsError: there is no draw.
    """
    if not controls:
        raise SettingsError(f"No probes of the control {control!r} were given: give at least one draw.")
    read = activations if control_activations is None else control_activations
    if read.source != activations.source:
        raise DataError(
            f"The activations of the control {control!r} are of other examples than those of the probes: "
            "record the same examples."
        )
    _check_evaluated(probes, activations)
    for draw in controls:
        _check_evaluated(draw, read)
    targets = probe_targets(activations, probes.target)
    truth = np.broadcast_to(targets if control_targets is None else control_targets, (len(controls), len(targets)))
    return tuple(
        ControlComparison(
            control=control,
            layer=probe.layer,
            correct=np.asarray(probe.predict(activations.values[probe.layer]) == targets),
            control_correct=np.mean(
                [
                    draw[probe.layer].predict(read.values[probe.layer]) == expected
                    for draw, expected in zip(controls, truth, strict=True)
                ],
                axis=0,
            ),
        )
        for probe in probes.probes
    )


def _check_evaluated(probes: Probes, activations: Activations) -> None:
    """Refuse activations that the probes were fitted on, or that are of another classifier."""
    if activations.source == probes.source:
        raise SplitError(
            "The probes are to be evaluated on the examples that they were fitted on: "
            "give activations of other examples."
        )
    if activations.labels != probes.labels or activations.n_layers != len(probes):
        raise DataError(
            f"The activations have {activations.n_layers} layers and the labels {activations.labels}, "
            f"the probes {len(probes)} and {probes.labels}: give activations of the same classifier."
        )
