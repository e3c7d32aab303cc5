"""TransformerLens, in a process of its own: it takes commands, a line of JSON each, and answers with one.

load    boots the bridge from a folder of weights and inputs
run     runs the sweep, or the small one, writes the logits to a file and says how long it took
peak    runs the sweep and says how much memory that took at most
"""

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import timing
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from peers.base import Peer, Task, TaskBatch, by_layer, units_of


class BridgedModel(Peer):
    """A call of `run_with_hooks` for every batch and cell."""

    name: ClassVar[str] = "TransformerLens"
    package: ClassVar[str] = "transformer-lens"

    def clean(self, batch: TaskBatch) -> Tensor:
        """Return the clean logits of a batch."""
        return self.module(*batch.inputs.values())

    def edited(self, task: Task, batch: TaskBatch) -> Iterator[tuple[Any, Tensor]]:
        """Yield a cell at a time."""
        units = units_of(task)
        example, rows = batch.rows.new_tensor(range(len(batch)))[:, None], batch.rows[:, None]
        for layer, positions in by_layer(task).items():
            for position in positions:
                hook = partial(_zero, example, rows, units[position])
                yield (
                    position,
                    self.module.run_with_hooks(*batch.inputs.values(), fwd_hooks=[(f"blocks.{layer}.hook_out", hook)]),
                )


def _zero(example: Tensor, rows: Tensor, units: Tensor, states: Tensor, hook: Any) -> Tensor:
    states[example, rows, units] = 0
    return states


def booted(folder: Path, kind: str, device: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Return the bridge around the classifier, or None and why each way to make one failed."""
    reasons = []
    for way, options in (
        ("from its folder", {}),
        ("given the loaded model", {"hf_model": partial(_loaded, folder, kind, device, dtype)}),
    ):
        try:
            bridge = TransformerBridge.boot_transformers(
                str(folder), device=device, dtype=dtype, **{name: make() for name, make in options.items()}
            )
        except Exception as error:  # whatever it says is the reason
            reasons.append(f"{way}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        found = type(bridge.original_model).__name__
        if found == kind:
            return bridge.eval(), []
        reasons.append(f"{way}: it loaded a {found}, which has another head than {kind}")
    return None, reasons


def _loaded(folder: Path, kind: str, device: str, dtype: torch.dtype) -> Any:
    return getattr(transformers, kind).from_pretrained(folder, local_files_only=True).to(device, dtype).eval()


def read_task(folder: Path, plan: dict[str, Any], bridge: Any, device: str) -> Task:
    """Return the task that lies in a folder."""
    tensors = {name: value.to(device) for name, value in load_file(folder / "inputs.safetensors").items()}
    batches = tuple(
        TaskBatch(
            tensors[f"{i}.index"],
            {name: tensors[f"{i}.inputs.{name}"] for name in plan["inputs"]},
            tensors[f"{i}.rows"],
            length,
        )
        for i, length in enumerate(plan["n_tokens"])
    )
    cells = tuple((layer, tuple(units)) for layer, units in plan["cells"])
    return Task(bridge, (), batches, cells, plan["n_labels"])


class Process:
    """The commands; the state between them is the task that was loaded last."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.side: BridgedModel | None = None

    def load(self, folder: str, threads: int, device: str, dtype: str) -> dict[str, Any]:
        """Boot the bridge, or say why that is refused."""
        torch.set_num_threads(threads)
        self.task = self.side = None
        place, plan = Path(folder), json.loads((Path(folder) / "task.json").read_text())
        bridge, reasons = booted(place / "model", plan["kind"], device, getattr(torch, dtype))
        if bridge is None:
            return {"refused": "; ".join(reasons)}
        self.task = read_task(place, plan, bridge, device)
        self.side = BridgedModel(self.task)
        return {}

    def threads(self, threads: int) -> dict[str, Any]:
        """Set how many threads the next runs have."""
        torch.set_num_threads(threads)
        return {}

    def run(self, small: bool, answer: str) -> dict[str, Any]:
        """Run the sweep."""
        assert self.side is not None
        assert self.task is not None
        task = self.task.small() if small else self.task
        took, logits = timing.seconds(partial(self.side.run, task), task.device)
        save_file({"logits": torch.from_numpy(logits.logits), "clean": torch.from_numpy(logits.clean)}, answer)
        return {"seconds": took}

    def peak(self) -> dict[str, Any]:
        """Measure memory."""
        assert self.side is not None
        assert self.task is not None
        return {"mb": timing.peak_mb(partial(self.side.run, self.task.small()), self.task.device)}


def main() -> None:
    """Answer commands until the input ends."""
    # What the library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    process = Process()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(process, command.pop("do"))(**command)
        except Exception as error:  # the other side decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
