"""TransformerLens, asked over a pipe: weights and inputs go by file, seconds and logits come back."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from peers.base import Answer, Task
from peers.side import RefusedError, Side

BENCHMARKS = Path(__file__).parents[1]


class TransformerLens(Side):
    """The bridge of TransformerLens where it can load the classifier; its process serves all workloads of a run."""

    name: ClassVar[str] = "TransformerLens"
    package: ClassVar[str] = "transformer-lens"
    _process: ClassVar["subprocess.Popen[str] | None"] = None
    _errors: ClassVar[IO[str] | None] = None

    def __init__(self, task: Task) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="transformer-lens-"))
        write_task(task, self.folder)
        parameter = next(task.module.parameters())
        self.version()  # absent is not the same as refusing
        answer = self._ask("load", folder=str(self.folder), **_place(parameter))
        if "refused" in answer:
            self.close()
            raise RefusedError(answer["refused"])

    def prepare(self, task: Task) -> None:
        """Warm up, with the threads that all sides have from now on."""
        del task
        self._ask("threads", threads=torch.get_num_threads())
        self._run(small=True)

    def run(self, task: Task) -> Answer:
        """Run the task that was sent when this was made."""
        del task
        return self._run(small=False)

    def peak_mb(self, task: Task) -> float:
        """Return the peak memory of its process."""
        del task
        return float(self._ask("peak")["mb"])

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *, small: bool) -> Answer:
        path = self.folder / "answer.safetensors"
        took = self._ask("run", small=small, answer=str(path))["seconds"]
        tensors = load_file(path)
        return Answer(tensors["logits"].numpy(), tensors["clean"].numpy(), float(took))

    @classmethod
    def _ask(cls, command: str, **options: Any) -> dict[str, Any]:
        if cls._process is None or cls._process.poll() is not None:
            cls._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
            cls._process = _started(cls._errors)
        process = cls._process
        _pipe(process.stdin).write(json.dumps({"do": command, **options}) + "\n")
        _pipe(process.stdin).flush()
        line = _pipe(process.stdout).readline()
        if not line:
            _pipe(cls._errors).seek(0)
            last = _pipe(cls._errors).read().strip().splitlines()[-1:]
            raise RuntimeError(f"its process ended with status {process.wait()}: {' '.join(last)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def write_task(task: Task, folder: Path) -> None:
    """Write the model, the batches and the cells of a task."""
    module: Any = task.module
    module.save_pretrained(folder / "model")
    # The bridge of a text model insists on a tokenizer, which no run uses.
    words = {"[PAD]": 0, "[UNK]": 1, "[BOS]": 2, "[EOS]": 3}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
    ).save_pretrained(folder / "model")
    tensors = {}
    for i, batch in enumerate(task.batches):
        tensors |= {f"{i}.index": batch.index, f"{i}.rows": batch.rows}
        tensors |= {f"{i}.inputs.{name}": value for name, value in batch.inputs.items()}
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / "inputs.safetensors")
    plan = {
        "kind": type(module).__name__,
        "inputs": list(task.batches[0].inputs),
        "n_tokens": [batch.n_tokens for batch in task.batches],
        "cells": [[layer, list(units)] for layer, units in task.cells],
        "n_labels": task.n_labels,
    }
    (folder / "task.json").write_text(json.dumps(plan))


def stop() -> None:
    """End the process, if it was started."""
    process, TransformerLens._process = TransformerLens._process, None
    if process is not None:
        _pipe(process.stdin).close()
        process.wait(timeout=60)


def _started(errors: IO[str]) -> "subprocess.Popen[str]":
    # When it boots a vision model it may install torchvision by itself; these settings forbid that.
    quiet = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, "-m", "peers.transformer_lens_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | quiet | {"PYTHONPATH": str(BENCHMARKS)},
    )


def _place(parameter: torch.Tensor) -> dict[str, Any]:
    device, dtype = str(parameter.device), str(parameter.dtype).removeprefix("torch.")
    return {"threads": torch.get_num_threads(), "device": device, "dtype": dtype}


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
