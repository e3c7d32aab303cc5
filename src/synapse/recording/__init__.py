"""Record the readout state of every layer for every example."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from synapse.data.examples import Examples
from synapse.errors import ResourceError, SettingsError, near
from synapse.model.classifier import Classifier
from synapse.moments import Moments
from synapse.recording.folder import DTYPES, Draft, Layout, Recording, in_words
from synapse.recording.passes import Wanted, run_window
from synapse.recording.shelf import Shelf, default_shelf, depends_on, key_of
from synapse.recording.untrained import untrained
from synapse.types import Activations, Component, Progress, silent

__all__ = [
    "Recording",
    "Shelf",
    "bytes_on_disk",
    "default_shelf",
    "in_words",
    "record",
    "record_components",
    "record_untrained",
]


def record(
    classifier: Classifier,
    examples: Examples,
    *,
    component: Component = "residual",
    keep: Path | str | None = None,
    dtype: str = "float32",
    depth: int | None = None,
    logits: bool = True,
    progress: Progress = silent,
) -> Activations:
    """Return the readout states of a component in all layers, the logits and the features of every example.

    Each example is run once, in windows of consecutive examples and, in each, batches of like length; the result is in
    the order of the examples and depends on neither batch size nor padding beyond float tolerance.

    `keep` is a folder of recordings. What is recorded goes there as it is made, and memory holds one window of it at a
    time; states are then read from there when they are asked for, stored as `dtype` (`float32`, `float16`, `bfloat16`).
    A recording that was killed goes on at the next call and ends bitwise as if it had not been. One that is there
    already is not made again: it is found by the weights, the preprocessed inputs, the labels and the options.

    `depth` is the number of layers to record, from the first on. Without `logits`, a forward pass ends where the last
    state that is wanted has been seen.

    Raises:
        LabelError: the examples' labels are not those of the classifier.
        SettingsError: the classifier has no such component (the message says why), so many layers, or there is no such
            type.
        ModelError: a state or a logit is not finite.
        ResourceError: memory or the disk does not suffice.
    """
    found = record_components(
        classifier, examples, [component], keep=keep, dtype=dtype, depth=depth, logits=logits, progress=progress
    )
    return found[component]


def record_components(
    classifier: Classifier,
    examples: Examples,
    components: Sequence[Component],
    *,
    keep: Path | str | None = None,
    dtype: str = "float32",
    depth: int | None = None,
    logits: bool = True,
    progress: Progress = silent,
) -> Mapping[Component, Activations]:
    """Return the activations of several components from one pass over the examples; otherwise as `record`."""
    if dtype not in DTYPES:
        raise SettingsError(f"There is no type {dtype!r} to store; one of {', '.join(DTYPES)}.{near(dtype, DTYPES)}")
    if dtype != "float32" and keep is None:
        raise SettingsError(f"States are held in memory as float32; to store them as {dtype}, give a folder: `keep=`.")
    if depth is not None and not 1 <= depth <= classifier.n_layers:
        raise SettingsError(f"depth is {depth}; a number of layers from 1 to {classifier.n_layers} was expected.")
    wanted = Wanted(tuple(dict.fromkeys(components)), depth or classifier.n_layers, logits)
    targets = examples.targets(classifier.labels)
    layout = _layout(classifier, len(examples), wanted, dtype)
    if keep is None:
        return _in_memory(classifier, examples, targets, wanted, layout, progress)
    recording = _kept(classifier, examples, targets, wanted, layout, Shelf(Path(keep)), progress)
    several = _reads_several_rows(classifier)
    return {name: recording.activations(name, reads_several_rows=several) for name in wanted.components}


def bytes_on_disk(classifier: Classifier, n_examples: int, components: Sequence[Component]) -> int:
    """Return how many bytes a recording of so many examples takes, kept in float32."""
    return _layout(classifier, n_examples, Wanted(tuple(components), classifier.n_layers, True), "float32").n_bytes


def record_untrained(
    classifier: Classifier,
    examples: Examples,
    *,
    component: Component = "residual",
    seed: int = 0,
    progress: Progress = silent,
) -> Activations:
    """Return what `record` would, had the classifier learned nothing: the control of what training put into a state.

    The model is of the same architecture with random weights, drawn by the architecture's own initialiser where it is
    of the model library. Weights that no initialiser changes are permuted, each tensor within itself, which keeps their
    distribution. The given classifier is left as it is. Its anatomy is taken over, not proved again.

    The logits are those of the random model: give probes the gold labels, or the given classifier's predictions.

    Raises:
        SettingsError: a block holds quantised weights only, which cannot be drawn anew; or as `record`.
        LabelError, ModelError: as `record`.

    *Source*: Zhang & Bowman (BlackboxNLP 2018), arXiv 1809.10040.
    """
    return record(untrained(classifier, seed), examples, component=component, progress=progress)


def _layout(classifier: Classifier, n_examples: int, wanted: Wanted, dtype: str) -> Layout:
    sizes = {name: (len(sites), sites[0].width) for name, sites in wanted.sites(classifier).items()}
    return Layout(n_examples, classifier.labels, sizes, wanted.n_features(classifier), wanted.logits, dtype)


def _in_memory(
    classifier: Classifier,
    examples: Examples,
    targets: np.ndarray,
    wanted: Wanted,
    layout: Layout,
    progress: Progress,
) -> Mapping[Component, Activations]:
    """Record into arrays."""
    n = layout.n_examples
    values = {name: np.empty((depth, n, width), np.float32) for name, (depth, width) in layout.components.items()}
    logits = np.empty((n, len(layout.labels)), np.float32) if layout.has_logits else None
    features = None if layout.n_features is None else np.empty((n, layout.n_features), np.float32)
    moments = {name: Moments.none(*shape) for name, shape in layout.moments.items()}
    counted = _Counted(progress, n)
    for window in range(layout.n_windows):
        span = layout.span(window)
        positions = np.arange(span.start, span.stop)
        found = run_window(
            classifier, examples.take(positions), targets[span], wanted, first=span.start, progress=counted.add
        )
        for name in wanted.components:
            values[name][:, span] = found.values[name]
            moments[f"{name}/rows"] = moments[f"{name}/rows"].merged(found.rows[name])
            moments[f"{name}/classes"] = moments[f"{name}/classes"].merged(found.classes[name])
        if logits is not None:
            logits[span] = found.logits
        if features is not None:
            features[span] = found.features
    return {
        name: Activations(
            values=values[name],
            logits=logits,
            features=features,
            targets=targets,
            labels=classifier.labels,
            row_mean=moments[f"{name}/rows"].mean.astype(np.float32),
            row_deviation=moments[f"{name}/rows"].deviation.astype(np.float32),
            class_moments=moments[f"{name}/classes"],
            source=examples.fingerprint,
            component=name,
            reads_several_rows=_reads_several_rows(classifier),
        )
        for name in wanted.components
    }


def _kept(
    classifier: Classifier,
    examples: Examples,
    targets: np.ndarray,
    wanted: Wanted,
    layout: Layout,
    shelf: Shelf,
    progress: Progress,
) -> Recording:
    """Return the recording from the shelf, made now as far as it is not there."""
    dependencies = depends_on(classifier, examples, targets, wanted, layout)
    key = key_of(dependencies)
    with shelf.recording(key):
        found = shelf.find(key)
        if found is not None:
            progress(len(examples), len(examples))
            return found
        draft = shelf.draft(key, layout, dependencies, targets)
        if not draft.is_sealed:
            counted = _Counted(progress, len(examples))
            for window in range(layout.n_windows):
                _write_window(classifier, examples, targets, wanted, draft, window, counted)
            draft.seal()
        return draft.moved(shelf.folder / key)


def _write_window(
    classifier: Classifier,
    examples: Examples,
    targets: np.ndarray,
    wanted: Wanted,
    draft: Draft,
    window: int,
    counted: "_Counted",
) -> None:
    span = draft.layout.span(window)
    if draft.is_done(window):
        counted.add(span.stop - span.start)
        return
    some = examples.take(np.arange(span.start, span.stop))
    found = run_window(classifier, some, targets[span], wanted, first=span.start, progress=counted.add)
    try:
        draft.write(window, found)
    except OSError as error:
        raise ResourceError(
            f"The recording cannot be written on to {str(draft.folder.parent)!r} ({error.strerror or error}); what was "
            "written stays, and the next call goes on from there."
        ) from error


def _reads_several_rows(classifier: Classifier) -> bool:
    return classifier.anatomy.readout not in ("first", "last")


class _Counted:
    """Counts the examples that are through."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, examples: int) -> None:
        self.done += examples
        self.progress(self.done, self.total)
