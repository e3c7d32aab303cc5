"""NeuroX: its logistic regression probe at its defaults."""

import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from neurox.interpretation.linear_probe import train_logistic_regression_probe

from peers.probe_tasks import Fits, LossTask
from peers.side import Side


class NeuroxProbe(Side):
    """A call of `train_logistic_regression_probe` for every layer: 10 epochs of Adam in batches of 32, no penalty."""

    name: ClassVar[str] = "NeuroX"
    package: ClassVar[str] = "neurox"

    def __init__(self, task: LossTask) -> None:
        del task

    def prepare(self, task: LossTask) -> None:
        """Warm up on one layer."""
        self.run(task.small())

    def run(self, task: LossTask) -> Fits:
        """Return weights and intercepts."""
        torch.manual_seed(0)  # of the weights it begins with
        found = []
        # It prints, and shows its progress.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            for x in task.states:
                probe = train_logistic_regression_probe(x, task.targets)
                weights, intercept = (each.detach().numpy().astype(np.float64) for each in probe.parameters())
                found.append((weights, intercept))
        return Fits(tuple(found))
