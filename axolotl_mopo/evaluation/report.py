"""A front as a terminal table, as CSV and as JSON."""

import csv
import io
import json
import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from axolotl_mopo.evaluation.policies import Policy
from axolotl_mopo.evaluation.statistics import Estimate, Front, PolicyResult


def table(front: Front) -> Table:
    """The policies, a line each; means with the half-widths of their 95% intervals."""
    shown = Table(title="Pareto front", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # two objectives fit into 80 columns
    shown.add_column("policy", min_width=12)
    against = any(standing.win_rates for standing in front.standings)
    numbers = []
    for name in front.objectives:
        numbers += [f"{name} {'↓' if name in front.lower_is_better else '↑'}", *(["wins"] if against else [])]
    for head in (*numbers, "KL", "tokens", "ended"):
        shown.add_column(head, justify="right", min_width=min(len(head), 9))
    shown.add_column("front", min_width=9)
    for standing in front.standings:
        rewards = []
        for name in front.objectives:
            wins = [f"{100 * standing.win_rates[name]:.0f}%"] if standing.win_rates else [""] if against else []
            rewards += [_with_width(standing.rewards[name]), *wins]
        shown.add_row(
            _title(standing.policy),
            *rewards,
            f"{standing.kl.mean:.3g}" if standing.kl else "-",
            f"{standing.tokens:.0f}",
            f"{100 * standing.finished:.0f}%",
            "yes" if standing.on_front else f"no: {', '.join(standing.dominated_by)}",
            style="bold" if standing.on_front else "dim",
        )
    return shown


def _title(policy: Policy) -> Text:
    """Not as rich's markup, since a label may hold anything."""
    kind = " (baseline)" if policy.kind == "baseline" else ""
    return Text(f"{policy.name}{kind}" + ("" if policy.label == policy.name else f"\n{policy.label}"))


def notes(front: Front) -> list[str]:
    """What a reader of the numbers must know."""
    point = ", ".join(f"{name} {value:.4g}" for name, value in front.reference_point.items())
    lines = [
        f"{front.prompts:,} prompts, {front.samples} responses to each; ± is half of a 95% bootstrap interval over "
        "prompts, wins how often a policy's response to a prompt is better than the reference's.",
        f"Hypervolume above ({point}): {front.hypervolume['policies']:.4g} for the policies, "
        f"{front.hypervolume['all']:.4g} with baselines and reference.",
    ]
    if not front.exact_sampling and any(standing.kl for standing in front.standings):
        lines.append(
            "KL: the mean log-ratio of these responses, which were not drawn at temperature 1 and top-p 1; so it is no "
            "estimate of the policies' divergence."
        )
    return lines


def to_csv(front: Front) -> str:
    """A line for every policy."""
    text = io.StringIO()
    lines = [_flat(front, standing) for standing in front.standings]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def to_json(front: Front) -> str:
    """Everything, with null where there is no number."""
    content = {
        "objectives": [
            {"name": name, "lower_is_better": name in front.lower_is_better, "begins_at": front.reference_point[name]}
            for name in front.objectives
        ],
        "hypervolume": front.hypervolume,
        "prompts": front.prompts,
        "samples": front.samples,
        "exact_sampling": front.exact_sampling,
        "policies": [
            {
                "name": standing.policy.name,
                "kind": standing.policy.kind,
                "path": standing.policy.path,
                "weights": standing.policy.weights,
                "rewards": {name: _numbers(value) for name, value in standing.rewards.items()},
                "win_rates": standing.win_rates,
                "kl": _numbers(standing.kl) if standing.kl else None,
                "tokens": standing.tokens,
                "finished": standing.finished,
                "on_front": standing.on_front,
                "dominated_by": standing.dominated_by,
            }
            for standing in front.standings
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _flat(front: Front, standing: PolicyResult) -> dict[str, Any]:
    line: dict[str, Any] = {
        "policy": _plain(standing.policy.name),
        "kind": standing.policy.kind,
        "weights": _plain(standing.policy.label),
    }
    for name in front.objectives:
        line |= _columns(name, standing.rewards[name])
        line[f"{name}_win_rate"] = (standing.win_rates or {}).get(name)
    line |= _columns("kl", standing.kl)
    return line | {
        "tokens": standing.tokens,
        "finished": standing.finished,
        "on_front": standing.on_front,
        "dominated_by": " ".join(standing.dominated_by),
    }


def _plain(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _columns(name: str, value: Estimate | None) -> dict[str, float | None]:
    numbers = _numbers(value) if value else dict.fromkeys(Estimate._fields)
    return {name if part == "mean" else f"{name}_{part}": number for part, number in numbers.items()}


def _numbers(value: Estimate) -> dict[str, float | None]:
    return {part: None if math.isnan(number) else number for part, number in value._asdict().items()}


def _with_width(value: Estimate) -> str:
    half = (value.high - value.low) / 2
    return f"{value.mean:.3g}" if math.isnan(half) else f"{value.mean:.3g} ± {half:.2g}"
