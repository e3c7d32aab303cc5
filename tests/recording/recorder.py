"""Recording in processes that can be killed and measured, and what the tests of recordings share.

`python recorder.py KIND` makes a model once; for each line `FOLDER N` of its input, a child process records N examples
into the folder (`-`: in memory). The child's number is written out when it has begun. It leaves a file of that name in
the working directory: on how many examples the model was run, and by how many bytes the most memory that it held grew.
"""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from planted import LABELS, planted_examples, random_classifier, random_examples
from torch import Tensor, nn

import synapse.recording.folder
from synapse.data.examples import Examples
from synapse.model.classifier import Classifier
from synapse.recording import record

N_LAYERS, WIDTH = 16, 384


def small_windows(monkeypatch, most: int = 8) -> None:
    """Let a window hold so many examples at most."""
    for name, value in (("_WINDOW_BYTES", 1), ("_FEWEST", most), ("_MOST", most)):
        monkeypatch.setattr(synapse.recording.folder, name, value)


def files_of(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a folder by its place in it, hidden ones and all."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def only_recording(shelf: Path) -> Path:
    """Return the folder of the one recording that is there."""
    (folder,) = (path for path in shelf.iterdir() if not path.name.startswith("."))
    return folder


@contextmanager
def counted_calls(module: nn.Module):
    """Give a list to which every forward call of a module adds the number of its examples.

    No hook is used: hooks are part of what a recording is found by.
    """
    calls: list[int] = []
    forward = module.forward

    def counted(*given, **named):
        calls.append(len(next(iter((*given, *named.values())))))
        return forward(*given, **named)

    module.forward = counted
    try:
        yield calls
    finally:
        del module.forward


LOOKED_AT = 2
"""Examples that are run to tell what the model is, where nothing is applied to it."""


class MixBlock(nn.Module):
    """Adds the mean of the rows, each unit by a weight of its own: wide, and nearly free to run."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.1 * self.weight * hidden.mean(dim=1, keepdim=True)


class WideClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList([MixBlock(seed) for seed in range(N_LAYERS)])
        self.head = nn.Linear(WIDTH, len(LABELS))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[:, 0])


def wide_classifier() -> Classifier:
    """A classifier as deep and wide as a small real one."""
    return Classifier.from_module(
        WideClassifier().eval(),
        preprocess=lambda ids: {"ids": torch.as_tensor(np.asarray(ids))},
        labels=LABELS,
        sample=planted_examples(4, seed=99).inputs,
        name="wide",
    )


class Recorder:
    """The process that starts the recordings."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def start(self, keep: Path | None, n: int) -> int:
        """Begin a recording, and return the number of its process."""
        self.process.stdin.write(f"{keep or '-'} {n}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self, child: int) -> tuple[int, int]:
        """Wait for the end of a recording; return how many examples the model was run on, and how memory grew."""
        deadline = time.monotonic() + 60
        while is_running(child):
            assert time.monotonic() < deadline, "a recording takes longer than a minute"
            time.sleep(0.01)
        examples, memory = (self.folder / str(child)).read_text().split()
        return int(examples), int(memory)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def is_running(child: int) -> bool:
    """Return whether a process is there."""
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True


def examples_of(kind: str, n: int) -> Examples:
    return planted_examples(n, seed=1) if kind == "wide" else random_examples(n, seed=1)


def serve(kind: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    most = 64 if kind == "wide" else 8
    folder = synapse.recording.folder
    folder._WINDOW_BYTES, folder._FEWEST, folder._MOST = 1, most, most
    classifier = wide_classifier() if kind == "wide" else random_classifier("bert")
    for line in sys.stdin:
        keep, n = line.split()
        child = os.fork()
        if child:
            sys.stdout.write(f"{child}\n")
            sys.stdout.flush()
            continue
        examples = examples_of(kind, int(n))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with counted_calls(classifier.module) as calls:
            record(classifier, examples, keep=None if keep == "-" else keep)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Path(str(os.getpid())).write_text(f"{sum(calls)} {(after - before) * 1024}")
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
