"""Averages per-pair metrics over a logging window and over all ranks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor


class Metric(NamedTuple):
    """A logged metric, for the generated reference; <margin> and <dimension> in its name are placeholders."""

    name: str
    meaning: str
    methods: tuple[str, ...] = ("modpo", "amopo")


_MODPO, _AMOPO = ("modpo",), ("amopo",)
_IMPLICIT = (
    "MODPO: implicit reward s of the objective that orders the pairs. AMoPO: sum of the rewards r_d of the prompts, "
    "weighted by alpha_d."
)
METRICS = (
    Metric("rewards/chosen", f"Reward of the chosen response. {_IMPLICIT}"),
    Metric("rewards/rejected", "The same for the rejected response."),
    Metric("rewards/margins", "Reward of chosen minus that of rejected."),
    Metric("rewards/margins_std", "Standard deviation of that difference."),
    Metric("rewards/accuracies", "Fraction of pairs whose chosen response has the higher reward."),
    Metric("logps/chosen", "Log-prob of the chosen completion. AMoPO: its mean over the prompts."),
    Metric("logps/rejected", "The same for the rejected completion."),
    Metric("rewards/collective_chosen", "beta * (logp - ref_logp): reward of all objectives together.", _MODPO),
    Metric("rewards/collective_rejected", "The same for the rejected response.", _MODPO),
    Metric("rewards/collective_margins", "Collective reward of chosen minus that of rejected.", _MODPO),
    Metric("margins/<margin>", "Margin reward of chosen minus that of rejected, without its weight.", _MODPO),
    Metric("margins/<margin>/chosen", "Margin reward of the chosen response.", _MODPO),
    Metric("margins/<margin>/rejected", "Margin reward of the rejected response.", _MODPO),
    Metric("margins_std/<margin>", "Standard deviation of the margin's difference.", _MODPO),
    Metric("rewards/margins/<dimension>", "Reward r_d of one prompt: chosen minus rejected.", _AMOPO),
    Metric("rewards/accuracies/<dimension>", "Fraction of pairs whose chosen response has the higher r_d.", _AMOPO),
    Metric("rewards/margins_std/<dimension>", "Standard deviation of the difference of r_d.", _AMOPO),
    Metric("weights/<dimension>", "Mean of the weight alpha_d.", _AMOPO),
    Metric("weights_std/<dimension>", "Standard deviation of alpha_d.", _AMOPO),
    Metric("aux_loss", "Load-balancing loss of a mixture of experts, without its coefficient."),
    Metric("skipped_steps", "Number of steps that `on_bad_loss: skip` has skipped since the start of the run."),
)
"""Metrics that the trainers log besides Axolotl's. In evaluation all but `skipped_steps` have the prefix `eval_`."""


class Statistic(NamedTuple):
    """Mean and standard deviation of a metric over all pairs of a window."""

    mean: float
    std: float
    """Standard deviation, n in the denominator."""


class MetricWindow:
    """Sums per-pair metrics on the device, and reads them once per window."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._marked: Tensor | None = None

    def mark(self) -> None:
        """Mark what was added so far."""
        self._marked = self._sums

    def rewind(self) -> None:
        """Remove what was added since the mark."""
        self._sums = self._marked

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of B pairs, each [B]; every call must have the same names."""
        self._names = list(metrics)
        # A standard deviation is a small difference of large sums, so it needs float64; only MPS does not support it.
        dtype = torch.float32 if next(iter(metrics.values())).device.type == "mps" else torch.float64
        columns = torch.stack([values.detach().to(dtype) for values in metrics.values()])
        pairs = columns.new_full((1,), columns.shape[1])
        sums = torch.cat([columns.sum(1), columns.square().sum(1), pairs])
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self, accelerator: Accelerator) -> dict[str, Statistic]:
        """Return the statistics over all pairs of all ranks since the last call; empty if there are none.

        It needs one reduction and one read of the device.
        """
        if self._sums is None:
            return {}
        *sums, pairs = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        means = [total / pairs for total in sums]
        return {
            name: Statistic(mean, max(square - mean**2, 0.0) ** 0.5)
            for name, mean, square in zip(self._names, means, means[len(self._names) :], strict=False)
        }
