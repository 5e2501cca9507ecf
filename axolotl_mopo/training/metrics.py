"""Averages of per-pair numbers over a logging window and over all ranks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Statistic(NamedTuple):
    """A metric over every pair of a window."""

    mean: float
    std: float
    """Standard deviation, n in the denominator."""


class MetricWindow:
    """Sums per-pair metrics on the device; reads them back once a window."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._marked: Tensor | None = None

    def mark(self) -> None:
        """Remember what was added so far."""
        self._marked = self._sums

    def rewind(self) -> None:
        """Forget what was added since the mark."""
        self._sums = self._marked

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a micro-batch of B pairs: every metric is a tensor [B]; the names are the same at every call."""
        self._names = list(metrics)
        # A spread is a small difference of large sums; only Apple's devices lack float64.
        dtype = torch.float32 if next(iter(metrics.values())).device.type == "mps" else torch.float64
        columns = torch.stack([values.detach().to(dtype) for values in metrics.values()])
        pairs = columns.new_full((1,), columns.shape[1])
        sums = torch.cat([columns.sum(1), columns.square().sum(1), pairs])
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self, accelerator: Accelerator) -> dict[str, Statistic]:
        """Every metric over all pairs of all ranks since the last call; one reduction, one read. Empty where none."""
        if self._sums is None:
            return {}
        *sums, pairs = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        means = [total / pairs for total in sums]
        return {
            name: Statistic(mean, max(square - mean**2, 0.0) ** 0.5)
            for name, mean, square in zip(self._names, means, means[len(self._names) :], strict=False)
        }
