"""Plots the metrics of every objective over a training run (`mopo.png`), without an experiment tracker."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

_PANELS = {
    "loss": ("loss",),
    "reward margins": ("rewards/margins", "rewards/margins/", "rewards/collective_margins"),
    "accuracies": ("rewards/accuracies", "rewards/accuracies/"),
    "weights of the dimensions": ("weights/",),
    "margin rewards, chosen - rejected": ("margins/",),
}
"""Title of a panel -> metrics that it shows. A name that ends with `/` selects all metrics directly below it."""

Curve = list[tuple[int, float]]


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Return the curves of every panel: metric name, with `eval_` for evaluation -> (step, value) pairs."""
    panels: dict[str, dict[str, Curve]] = defaultdict(lambda: defaultdict(list))
    for entry in history:
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            for title, metrics in _PANELS.items():
                if any(_shows(metric, name) for metric in metrics) and isinstance(value, int | float):
                    panels[title][key].append((entry["step"], float(value)))
    return {title: dict(panels[title]) for title in _PANELS if title in panels}


def draw(history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Plot a run's log as PNG, solid lines for training, dashed ones for evaluation; None if there is no metric."""
    from matplotlib.figure import Figure

    panels = curves(history)
    if not panels:
        return None
    figure = Figure(figsize=(7, 2.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, metrics) in zip(axes, panels.items(), strict=True):
        names = list(dict.fromkeys(key.removeprefix("eval_") for key in metrics))
        for key, curve in metrics.items():
            held_out = key.startswith("eval_")
            colour = f"C{names.index(key.removeprefix('eval_')) % 10}"
            style = {"linestyle": "--", "marker": "o", "markersize": 3} if held_out else {"label": _label(key)}
            axis.plot(*zip(*curve, strict=True), color=colour, linewidth=1.2, **style)
        axis.set_title(title, fontsize=9, loc="left")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlabel("step (dashed: evaluation)")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _shows(metric: str, name: str) -> bool:
    if not metric.endswith("/"):
        return name == metric
    rest = name.removeprefix(metric)
    return rest != name and "/" not in rest


def _label(key: str) -> str:
    return key.rpartition("/")[2]
