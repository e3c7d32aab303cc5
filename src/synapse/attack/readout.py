"""The logits as a function of the readout state of one layer: values, slopes, and no more run than that takes.

What lies below the layer is given again, and passes without a gradient also take over the rows that an edit does not
reach (see `synapse.model.resume`). On the first batch of a layer both are compared with the whole model, and beyond
`RESUME_TOLERANCE` the whole model is run.
"""

import logging
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.errors import ModelError
from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import Site, edited_sites
from synapse.model.resume import CleanPass, Reuse, Runs, clean_pass, resume_layer, run_logits
from synapse.model.trace import forward_logits, passed_over
from synapse.types import Component

log = logging.getLogger(__name__)

RESUME_TOLERANCE = 1e-3
"""Largest difference of logits or slopes, over the largest, at which what lies below a layer need not run again."""


class ReadoutMap:
    """The map from edits of the rows that the head reads, at one layer and in one batch, to the logits.

    `values` are the states, `clean_logits` the logits without an edit. `is_linear` says that the head is one linear map
    of these states; `weight` are its slopes then. `reuse` says, once tried, what each layer's passes take over.
    """

    def __init__(
        self, classifier: Classifier, batch: Batch, component: Component, layer: int, reuse: dict[int, Reuse]
    ) -> None:
        self.classifier, self.component, self.layer, self.reuse = classifier, component, layer, reuse
        self.site = classifier.sites(component)[layer]
        self.clean: CleanPass = clean_pass(
            classifier, batch, () if component == "residual" else (component,), reuse=component
        )
        states = self.clean.of(component)[layer]
        read = classifier.readout_state(batch, self.site, states)
        self.values: Float[np.ndarray, "example unit"] = read.cpu().numpy().astype(np.float64)
        self.clean_logits: Float[np.ndarray, "example label"] = self.clean.logits.double().cpu().numpy()
        self.is_linear = self.clean.features is not None and torch.equal(self.clean.features, read)
        if self.is_linear:
            self.weight: Float[np.ndarray, "label unit"] = classifier.head_weight().double().cpu().numpy()
        elif layer not in reuse:
            reuse[layer] = self._proved()

    def __len__(self) -> int:
        return len(self.values)

    def logits(
        self, offsets: Float[np.ndarray, "run unit"], example: Int[np.ndarray, "run"] | None = None
    ) -> Float[np.ndarray, "run label"]:
        """Return the logits of runs, each about one example (by default all, in order), with its offset added."""
        example = np.arange(len(self)) if example is None else example
        if self.is_linear:
            return np.asarray(self.clean_logits[example] + offsets @ self.weight.T)
        found = np.empty((len(example), self.clean_logits.shape[1]))
        for start in range(0, len(example), len(self)):
            part = slice(start, start + len(self))
            found[part] = self._run(self._tensor(offsets[part]), self._index(example[part])).double().cpu().numpy()
        return found

    def linearised(
        self,
        offsets: Float[np.ndarray, "run unit"],
        example: Int[np.ndarray, "run"],
        reference: Int[np.ndarray, "run"],
        rivals: Int[np.ndarray, "run rival"],
    ) -> tuple[Float[np.ndarray, "run label"], Float[np.ndarray, "run rival unit"]]:
        """Return the logits of runs, and the slopes of the leads of some rivals over a reference class.

        Raises:
            ModelError: the logits have no gradient.
        """
        with torch.enable_grad():
            given = self._tensor(offsets).requires_grad_()
            logits = self._graph(given, self._index(example))
            if not logits.requires_grad:
                raise ModelError(
                    "The logits have no gradient: the model computes them where gradients are turned off, or in whole "
                    "numbers. Attack its logits or its head instead."
                )
            # Runs of a batch do not see each other, so that the gradient of a sum over them is that of each.
            own = logits.gather(1, self._index(reference)[:, None])
            leads = (logits.gather(1, self._index(rivals)) - own).sum(dim=0)
            slopes = [torch.autograd.grad(lead, given, retain_graph=True, materialize_grads=True)[0] for lead in leads]
        return logits.detach().double().cpu().numpy(), torch.stack(slopes, dim=1).double().cpu().numpy()

    def _tensor(self, offsets: Float[np.ndarray, "run unit"]) -> Float[Tensor, "run unit"]:
        return torch.from_numpy(offsets).to(self.classifier.device, torch.float32)

    def _index(self, numbers: Int[np.ndarray, "*run"]) -> Int[Tensor, "*run"]:
        return torch.from_numpy(numbers).to(self.classifier.device)

    def _run(self, offsets: Float[Tensor, "run unit"], example: Int[Tensor, "run"]) -> Float[Tensor, "run label"]:
        """Return the logits, without a gradient."""
        if self.reuse[self.layer] != "rows":
            with torch.no_grad():
                return self._graph(offsets, example)
        edits = {self.layer: partial(_moved, self.classifier, self.site, offsets)}
        runs = Runs(self.component, self.layer, edits, example, in_readout_row=True)
        with torch.inference_mode():
            return run_logits(self.classifier, self.clean, runs).float()

    def _graph(self, offsets: Float[Tensor, "run unit"], example: Int[Tensor, "run"]) -> Float[Tensor, "run label"]:
        """Return the logits of all rows of all blocks above, ready for a gradient."""
        classifier, clean = self.classifier, self.clean
        batch = clean.batch.take(example)
        with ExitStack() as stack:
            if self.reuse[self.layer] != "none":
                below = resume_layer(classifier, self.component, self.layer)
                # Copies: what the clean pass kept was made in inference mode, and can be part of no gradient.
                states = None if below < 0 else clean.states[below][example]
                block = classifier.sites()[max(below, 0)]
                stack.enter_context(passed_over(classifier.module, clean.replay.take(example), below, block, states))
            edit = partial(_moved, classifier, self.site, offsets)
            stack.enter_context(edited_sites(classifier.module, [(self.site, edit)]))
            stack.enter_context(classifier.running(batch))
            return forward_logits(classifier.module, batch.inputs).float()

    def _proved(self) -> Reuse:
        """Return what passes can take over: logits and slopes at an offset must be those of the whole model."""
        offsets, own = 0.1 * np.roll(self.values, 1, axis=1), self.clean_logits.argmax(axis=1)
        self.reuse[self.layer] = "none"
        logits, slopes = self._slope(offsets, own)
        if reason := self._differs("prefix", offsets, own, (logits, slopes)):
            what = "the whole model is run for each edit, which is slow"
            log.warning("%s of layer %d: %s (%s).", self.component, self.layer, what, reason)
            return "none"
        if reason := self._differs("rows", offsets, own, (logits,)):
            log.info("%s of layer %d: all rows are run for each edit (%s).", self.component, self.layer, reason)
            return "prefix"
        return "rows"

    def _slope(
        self, offsets: Float[np.ndarray, "example unit"], own: Int[np.ndarray, "example"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and slopes of another class's lead."""
        other = (own + 1) % self.clean_logits.shape[1]
        return self.linearised(offsets, np.arange(len(self)), own, other[:, None])

    def _differs(
        self,
        reuse: Reuse,
        offsets: Float[np.ndarray, "example unit"],
        own: Int[np.ndarray, "example"],
        plain: tuple[np.ndarray, ...],
    ) -> str:
        """Return how passes that take over so much differ from plain ones; nothing where they do not."""
        self.reuse[self.layer] = reuse
        found: tuple[np.ndarray, ...]
        try:
            # Passes with a gradient take over no more than that.
            found = self._slope(offsets, own) if reuse == "prefix" else (self.logits(offsets),)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the model's own code may fail in any way on what is given again
            return f"{type(error).__name__}: {error}"
        gaps = [float(np.abs(a - b).max() / (np.abs(b).max() + 1e-30)) for a, b in zip(found, plain, strict=True)]
        agrees = max(gaps) <= RESUME_TOLERANCE  # false for NaN, which agrees with nothing
        return "" if agrees else f"they differ by {max(gaps):.1e} of the largest"


def _moved(
    classifier: Classifier,
    site: Site,
    offsets: Float[Tensor, "run unit"],
    states: Float[Tensor, "run token unit"],
) -> Float[Tensor, "run token unit"]:
    """Return the states with the offset added to the rows that the head reads."""
    spread = offsets[:, None].to(states.dtype)
    if states.shape[1] == 1:  # one row that stands for all of its example is the one
        return states + spread
    rows = classifier.rows(classifier.current_batch, site, states.shape[1], "readout")
    return states + (spread if rows is None else spread * rows[:, :, None].to(states.dtype))
