"""The windows of examples that a recording is made in, here or in other processes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int

from synapse.data.examples import Examples
from synapse.errors import ResourceError
from synapse.model.classifier import Classifier
from synapse.model.replica import Replica
from synapse.recording.folder import Draft, Layout
from synapse.recording.passes import Wanted, Window, run_window
from synapse.types import Progress, silent


@dataclass(frozen=True, eq=False)
class Recorder:
    """What the windows of a recording share: a recipe that travels to the processes that make them.

    With a `draft`, windows are written there by whoever made them; without, they are handed back.
    """

    replica: Replica
    examples: Examples
    targets: Int[np.ndarray, "example"]
    wanted: Wanted
    layout: Layout
    counted: "Counted"
    draft: Draft | None = None

    def into(self, draft: Draft) -> "Recorder":
        """Return one that writes to a draft."""
        return replace(self, draft=draft)

    def build(self) -> tuple["Recorder", Classifier]:
        """Return it, with a classifier of this process."""
        return self, self.replica.build()


def record_window(built: tuple[Recorder, Classifier], window: int) -> Window | None:
    """Return what a window of examples gives; None where it was written.

    Raises:
        ModelError: a state or a logit is not finite.
        ResourceError: it cannot be written.
    """
    recorder, classifier = built
    span, draft = recorder.layout.span(window), recorder.draft
    some = recorder.examples.take(np.arange(span.start, span.stop))
    report = partial(recorder.counted.add, window)
    found = run_window(classifier, some, recorder.targets[span], recorder.wanted, first=span.start, progress=report)
    if draft is None:
        return found
    try:
        draft.write(window, found)
    except OSError as error:
        raise ResourceError(
            f"The recording cannot be written on to {str(draft.folder.parent)!r} ({error.strerror or error}); what was "
            "written stays, and the next call goes on from there."
        ) from error
    return None


class Counted:
    """Counts the examples that are through, each once: as batches are, and as whole windows come in from elsewhere."""

    def __init__(self, progress: Progress, layout: Layout) -> None:
        self.progress, self.layout = progress, layout
        self.done = dict.fromkeys(range(layout.n_windows), 0)

    def add(self, window: int, examples: int) -> None:
        """Count some examples of a window."""
        self.done[window] += examples
        self._report()

    def through(self, window: int) -> None:
        """Count all of a window."""
        span = self.layout.span(window)
        if self.done[window] < span.stop - span.start:
            self.done[window] = span.stop - span.start
            self._report()

    def all_through(self) -> None:
        """Count everything."""
        self.progress(self.layout.n_examples, self.layout.n_examples)

    def _report(self) -> None:
        self.progress(sum(self.done.values()), self.layout.n_examples)

    def __getstate__(self) -> Mapping[str, Any]:
        """Return it without the one who is told, who stays in his process."""
        return {**self.__dict__, "progress": silent}
