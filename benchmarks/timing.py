"""What is measured: seconds, peak memory, arithmetic, and what the machine can do at most."""

import ctypes
import gc
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_KERNEL_BYTES = 1024
_MEBIBYTE = 2**20


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the wall time of one call, in seconds, and what it returned; a GPU is waited for on both ends."""
    gc.collect()
    synchronise(device)
    start = perf_counter()
    result = work()
    synchronise(device)
    return perf_counter() - start, result


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(work: Callable[[], Any], device: torch.device) -> float:
    """Return the peak memory in MiB: of a process of its own on a CPU (all it holds), of the device on a GPU.

    The process is a fork, so that weights and inputs need not be made again; nothing of an earlier call is in it.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return float(torch.cuda.max_memory_allocated(device)) / _MEBIBYTE
    gc.collect()
    give_back_memory()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks beside threads; the threads of torch sleep, and the child starts none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        # Whatever happens, the child must not go on with what its parent was about to do.
        try:
            os.close(reader)
            reset_peak()
            work()
            os.write(writer, json.dumps(resident_mb("VmHWM")).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not answer:
        raise RuntimeError(f"The process that measures memory ended with status {status}; measure with --no-memory.")
    return float(json.loads(answer))


def reset_peak() -> None:
    """Let the kernel's mark of the highest resident memory start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mb(field: str) -> float:
    """Return a memory figure of this process in MiB: `VmRSS` is what it holds now, `VmHWM` the most since the mark."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * _KERNEL_BYTES / _MEBIBYTE
    raise RuntimeError(f"The kernel reports no {field}.")


def give_back_memory() -> None:
    """Return freed memory to the system, so that it does not count as held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def flops(work: Callable[[], Any]) -> int:
    """Return the floating-point operations of all matrix products, convolutions and attentions of a call.

    A product of (m, k) and (k, n) counts 2mkn, as `torch.utils.flop_counter` does. That counter does not know the
    attention of the CPU, so it is told.
    """
    aten = torch.ops.aten
    own = {aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    return int(counter.get_total_flops())


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the operations of one attention, from shapes (example, head, token, unit): scores and weighted sum.

    A causal mask is not counted as less: whether it saves anything is the kernel's affair.
    """
    examples, heads, queries, width = query
    keys, out = key[2], value[3]
    return 2 * examples * heads * queries * keys * (width + out)


def matrix_rate(width: int, inner: int, device: torch.device, dtype: torch.dtype, *, spend: float = 0.15) -> float:
    """Return the machine's best rate of dense products in operations a second, over shapes like a block's own.

    Each shape is repeated for `spend` seconds, and the best repeat counts: this is what the machine can do, not what
    it does on average.
    """
    rows = (256, 1024) if device.type == "cpu" else (1024, 8192, 32768)
    sides = [(n, a, b) for n in rows for a, b in ((width, width), (width, inner), (inner, width))]
    sides.append((1024, 1024, 1024) if device.type == "cpu" else (8192, 8192, 8192))
    best = 0.0
    with torch.inference_mode():
        for n, a, b in sides:
            states = torch.randn(n, a, device=device, dtype=dtype)
            weights = torch.randn(b, a, device=device, dtype=dtype)
            shortest, start = math.inf, perf_counter()
            while perf_counter() - start < spend:
                took, _ = _product(states, weights, device)
                shortest = min(shortest, took)
            best = max(best, 2 * n * a * b / shortest)
    return best


def _product(states: torch.Tensor, weights: torch.Tensor, device: torch.device) -> tuple[float, torch.Tensor]:
    synchronise(device)
    start = perf_counter()
    result = torch.nn.functional.linear(states, weights)
    synchronise(device)
    return perf_counter() - start, result


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": "amx_bf16" in flags,
        "gpu": gpu,
        "system": platform.platform(terse=True),
        "python": sys.version.split()[0],
    }
