"""Plot a front: a scatter plot of two objectives, or a scatter matrix and parallel coordinates of more."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from axolotl_mopo.evaluation.statistics import Front, PolicyResult

MARKS = {"policy": ("o", "#1f5fbf"), "baseline": ("s", "#c2571a"), "reference": ("*", "#555555")}
"""The mark and the colour of each kind of policy."""

_DOMINATED = 0.45
_LABEL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "parse_math": False}
"""Style of a policy's label. `parse_math` is off since a label may contain `$`."""


def draw(front: Front, kind: str) -> bytes:
    """Plot a front as `png` or `svg`."""
    content = io.BytesIO()
    _figure(front).savefig(content, format=kind, dpi=150, bbox_inches="tight")
    return content.getvalue()


def _figure(front: Front) -> Figure:
    names = front.objectives
    if len(names) == 1:
        figure = Figure(figsize=(6, 0.5 * len(front.results) + 1.5), layout="constrained")
        _line(figure.subplots(), front, names[0])
        return figure
    if len(names) == 2:
        figure = Figure(figsize=(7, 5.5), layout="constrained")
        _plane(figure.subplots(), front, names[0], names[1], labels=True)
        return figure
    count = len(names)
    figure = Figure(figsize=(2.8 * count, 2.8 * count + 3.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.8 * count, 3.2])
    above, below = parts
    axes = above.subplots(count, count, squeeze=False)
    for row, y in enumerate(names):
        for column, x in enumerate(names):
            if row == column:
                _line(axes[row, column], front, x)
            else:
                _plane(axes[row, column], front, x, y, labels=False)
    _parallel(below.subplots(), front)
    return figure


def _plane(axes: Axes, front: Front, x: str, y: str, labels: bool) -> None:
    for result in front.results:
        _point(axes, result, x, y)
        if labels:
            place = (result.rewards[x].mean, result.rewards[y].mean)
            axes.annotate(result.policy.label, place, xytext=(5, 5), **_LABEL)
    if len(front.objectives) == 2:
        best = sorted((s.rewards[x].mean, s.rewards[y].mean) for s in front.results if s.on_front)
        axes.plot(*np.array(best).T, color="#999999", linewidth=1, zorder=0)
    _axis(axes.xaxis, axes.invert_xaxis, x, front)
    _axis(axes.yaxis, axes.invert_yaxis, y, front)
    if labels:
        axes.margins(x=0.2, y=0.1)
        _legend(axes, front)


def _point(axes: Axes, result: PolicyResult, x: str, y: str) -> None:
    mark, colour = MARKS[result.policy.kind]
    across, up = result.rewards[x], result.rewards[y]
    errors = [[[e.mean - e.low], [e.high - e.mean]] for e in (across, up)]
    alpha = 1.0 if result.on_front else _DOMINATED
    axes.errorbar(
        [across.mean], [up.mean], xerr=errors[0], yerr=errors[1], fmt=mark, color=colour, alpha=alpha, capsize=2
    )


def _line(axes: Axes, front: Front, name: str) -> None:
    """Plot one objective: one row per policy."""
    for place, result in enumerate(front.results):
        mark, colour = MARKS[result.policy.kind]
        value = result.rewards[name]
        error = [[value.mean - value.low], [value.high - value.mean]]
        axes.errorbar([value.mean], [place], xerr=error, fmt=mark, color=colour, capsize=2)
    axes.set_yticks(range(len(front.results)), [s.policy.name for s in front.results], fontsize=6)
    axes.invert_yaxis()
    _axis(axes.xaxis, axes.invert_xaxis, name, front)


def _parallel(axes: Axes, front: Front) -> None:
    """Plot parallel coordinates: one line per policy; each objective is scaled from its worst to its best mean."""
    means = np.array([[s.rewards[name].mean * front.better(name) for name in front.objectives] for s in front.results])
    span = np.ptp(means, axis=0)
    scaled = (means - means.min(0)) / np.where(span > 0, span, 1)
    for result, line in zip(front.results, scaled, strict=True):
        mark, colour = MARKS[result.policy.kind]
        alpha = 1.0 if result.on_front else _DOMINATED
        axes.plot(range(len(line)), line, marker=mark, color=colour, alpha=alpha, linewidth=1)
        axes.annotate(result.policy.label, (len(line) - 1, line[-1]), xytext=(6, 0), **_LABEL)
    axes.set_xticks(range(len(front.objectives)), front.objectives)
    axes.set_yticks([0, 1], ["worst", "best"])
    axes.margins(x=0.15)
    _legend(axes, front, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _axis(axis: Any, invert: Any, name: str, front: Front) -> None:
    """Label an axis and orient it so that better is to the right or up."""
    axis.set_label_text(name)
    if name in front.lower_is_better and not axis.get_inverted():
        invert()


def _legend(axes: Axes, front: Front, **place: Any) -> None:
    kinds = dict.fromkeys(result.policy.kind for result in front.results)
    if len(kinds) > 1:
        for kind in kinds:
            mark, colour = MARKS[kind]
            axes.plot([], [], mark, color=colour, label=kind)
        axes.legend(fontsize=8, **place)
