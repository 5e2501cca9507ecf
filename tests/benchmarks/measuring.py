"""Time and peak memory of steps, taken in turns in one process."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .contestants import Contestant


@dataclass
class Measurement:
    """What a contestant took."""

    name: str
    seconds: list[float]
    """Of a forward and backward pass, one for each round."""
    peak_bytes: int
    """Of memory above what stood before the step."""
    tokens: int

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)


def measure(model: Any, contestants: Sequence[Contestant], rounds: int, device: str) -> list[Measurement]:
    """One warm-up step of each, whose memory is taken, then `rounds` in turns, which are timed."""
    peaks = [_peak(model, contestant, device) for contestant in contestants]
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for contestant, taken in zip(contestants, seconds, strict=True):
            taken.append(_seconds(lambda contestant=contestant: contestant.loss().backward(), device))
            model.zero_grad(set_to_none=True)
    return [
        Measurement(contestant.name, taken, peak, contestant.tokens)
        for contestant, taken, peak in zip(contestants, seconds, peaks, strict=True)
    ]


def gemm_rate(hidden: int, inner: int, dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of this machine's matrix products at a model's sizes."""
    left = torch.randn(2048, hidden, dtype=dtype, device=device)
    right = torch.randn(hidden, inner, dtype=dtype, device=device)
    taken = [_seconds(lambda: left @ right, device) for _ in range(8)]
    return 2 * 2048 * hidden * inner / min(taken)


def _seconds(work: Callable[[], Any], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(model: Any, contestant: Contestant, device: str) -> int:
    # Gradients stand before the step, as in the second micro-batch of an accumulated step.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.loss().backward()
        _wait(device)
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory begins anew
        before = _resident("VmRSS")
        contestant.loss().backward()
        peak = _resident("VmHWM")
    model.zero_grad(set_to_none=True)
    return peak - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
