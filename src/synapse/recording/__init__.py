"""Record the readout state of every layer for every example."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from synapse.data.examples import Examples
from synapse.errors import SettingsError, near
from synapse.execute import Executor, for_models
from synapse.model.classifier import Classifier
from synapse.model.replica import Replica
from synapse.moments import Moments
from synapse.recording.folder import DTYPES, Layout, Recording, in_words
from synapse.recording.passes import Wanted
from synapse.recording.shelf import Shelf, default_shelf, depends_on, key_of
from synapse.recording.untrained import untrained
from synapse.recording.windows import Counted, Recorder, record_window
from synapse.types import Activations, Component, Progress, silent

__all__ = [
    "Recording",
    "Shelf",
    "default_shelf",
    "in_words",
    "layout_of",
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
    executor: Executor | None = None,
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
    state that is wanted has been seen. `executor` runs the windows, by default in this process; where its workers are
    on other machines, they write to `keep`, which must be a folder that all of them share.

    Raises:
        LabelError: the examples' labels are not those of the classifier.
        SettingsError: the classifier has no such component (the message says why), so many layers, or there is no such
            type.
        ModelError: a state or a logit is not finite.
        ResourceError: memory or the disk does not suffice.
    """
    found = record_components(
        classifier,
        examples,
        [component],
        keep=keep,
        dtype=dtype,
        depth=depth,
        logits=logits,
        executor=executor,
        progress=progress,
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
    executor: Executor | None = None,
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
    recorder = Recorder(Replica(classifier), examples, targets, wanted, layout, Counted(progress, layout))
    if keep is None:
        return _in_memory(recorder, for_models(executor))
    recording = _kept(recorder, Shelf(Path(keep)), for_models(executor))
    several = _reads_several_rows(classifier)
    return {name: recording.activations(name, reads_several_rows=several) for name in wanted.components}


def layout_of(classifier: Classifier, n_examples: int, components: Sequence[Component]) -> Layout:
    """Return what a recording of so many examples is made of, kept in float32: its windows and its bytes on disk."""
    return _layout(classifier, n_examples, Wanted(tuple(components), classifier.n_layers, True), "float32")


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


def _in_memory(recorder: Recorder, executor: Executor) -> Mapping[Component, Activations]:
    """Record into arrays."""
    classifier, layout, wanted = recorder.replica.classifier, recorder.layout, recorder.wanted
    n = layout.n_examples
    values = {name: np.empty((depth, n, width), np.float32) for name, (depth, width) in layout.components.items()}
    logits = np.empty((n, len(layout.labels)), np.float32) if layout.has_logits else None
    features = None if layout.n_features is None else np.empty((n, layout.n_features), np.float32)
    moments: dict[int, Mapping[str, Moments]] = {}
    for done in executor.results(record_window, range(layout.n_windows), shared=recorder):
        span, found = layout.span(done.position), done.result
        assert found is not None
        for name in wanted.components:
            values[name][:, span] = found.values[name]
        if logits is not None:
            logits[span] = found.logits
        if features is not None:
            features[span] = found.features
        moments[done.position] = found.moments
        recorder.counted.through(done.position)
    merged = {name: Moments.none(*shape) for name, shape in layout.moments.items()}
    for window in sorted(moments):  # in their order, whichever came in first
        merged = {name: whole.merged(moments[window][name]) for name, whole in merged.items()}
    return {
        name: Activations(
            values=values[name],
            logits=logits,
            features=features,
            targets=recorder.targets,
            labels=classifier.labels,
            row_mean=merged[f"{name}/rows"].mean.astype(np.float32),
            row_deviation=merged[f"{name}/rows"].deviation.astype(np.float32),
            class_moments=merged[f"{name}/classes"],
            source=recorder.examples.fingerprint,
            component=name,
            reads_several_rows=_reads_several_rows(classifier),
        )
        for name in wanted.components
    }


def _kept(recorder: Recorder, shelf: Shelf, executor: Executor) -> Recording:
    """Return the recording from the shelf, made now as far as it is not there."""
    examples, targets, layout = recorder.examples, recorder.targets, recorder.layout
    dependencies = depends_on(recorder.replica.classifier, examples, targets, recorder.wanted, layout)
    key = key_of(dependencies)
    with shelf.recording(key):
        found = shelf.find(key)
        if found is not None:
            recorder.counted.all_through()
            return found
        draft = shelf.draft(key, layout, dependencies, targets)
        if not draft.is_sealed:
            left = []
            for window in range(layout.n_windows):
                if draft.is_done(window):
                    recorder.counted.through(window)
                else:
                    left.append(window)
            for done in executor.results(record_window, left, shared=recorder.into(draft)):
                recorder.counted.through(left[done.position])
            draft.seal()
        return draft.moved(shelf.folder / key)


def _reads_several_rows(classifier: Classifier) -> bool:
    return classifier.anatomy.readout not in ("first", "last")
