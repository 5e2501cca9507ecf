"""Format a front as a terminal table, as CSV and as JSON."""

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
    """A table with one row per policy: means with the half-widths of their 95% intervals."""
    shown = Table(title="Pareto front", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # two objectives fit into 80 columns
    shown.add_column("policy", min_width=12)
    against = any(result.win_rates for result in front.results)
    numbers = []
    for name in front.objectives:
        numbers += [f"{name} {'↓' if name in front.lower_is_better else '↑'}", *(["wins"] if against else [])]
    for head in (*numbers, "KL", "tokens", "ended"):
        shown.add_column(head, justify="right", min_width=min(len(head), 9))
    shown.add_column("front", min_width=9)
    for result in front.results:
        rewards = []
        for name in front.objectives:
            wins = [f"{100 * result.win_rates[name]:.0f}%"] if result.win_rates else [""] if against else []
            rewards += [_with_width(result.rewards[name]), *wins]
        shown.add_row(
            _title(result.policy),
            *rewards,
            f"{result.kl.mean:.3g}" if result.kl else "-",
            f"{result.tokens:.0f}",
            f"{100 * result.finished:.0f}%",
            "yes" if result.on_front else f"no: {', '.join(result.dominated_by)}",
            style="bold" if result.on_front else "dim",
        )
    return shown


def _title(policy: Policy) -> Text:
    """A policy's name and label. A `Text`, since a label may contain anything and must not be read as rich's markup."""
    kind = " (baseline)" if policy.kind == "baseline" else ""
    return Text(f"{policy.name}{kind}" + ("" if policy.label == policy.name else f"\n{policy.label}"))


def notes(front: Front) -> list[str]:
    """Sentences that explain the numbers."""
    point = ", ".join(f"{name} {value:.4g}" for name, value in front.reference_point.items())
    lines = [
        f"{front.prompts:,} prompts, {front.samples} responses to each. ± is half the width of the 95% bootstrap "
        "interval over prompts; wins is how often a policy's response to a prompt is better than the reference's.",
        f"Hypervolume above ({point}): {front.hypervolume['policies']:.4g} for the policies, "
        f"{front.hypervolume['all']:.4g} with baselines and reference.",
    ]
    if front.of_reasoning:
        lines.append(f"Scored by reasoning and answer: {', '.join(front.of_reasoning)}.")
    if unanswered := {result.policy.name: result.unanswered for result in front.results if result.unanswered}:
        counts = ", ".join(f"{name} {count:,}" for name, count in unanswered.items())
        lines.append(f"Responses that ended inside their reasoning and have no answer: {counts}.")
    if not front.exact_sampling and any(result.kl for result in front.results):
        lines.append(
            "KL is the mean log-ratio of these responses. They were not drawn at temperature 1 and top-p 1, so it is "
            "not an estimate of the policies' divergence."
        )
    return lines


def to_csv(front: Front) -> str:
    """CSV with one line per policy."""
    text = io.StringIO()
    lines = [_flat(front, result) for result in front.results]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def to_json(front: Front) -> str:
    """JSON with all results; a missing number is null."""
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
                "name": result.policy.name,
                "kind": result.policy.kind,
                "path": result.policy.path,
                "weights": result.policy.weights,
                "rewards": {name: _numbers(value) for name, value in result.rewards.items()},
                "win_rates": result.win_rates,
                "kl": _numbers(result.kl) if result.kl else None,
                "tokens": result.tokens,
                "finished": result.finished,
                "on_front": result.on_front,
                "dominated_by": result.dominated_by,
            }
            for result in front.results
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _flat(front: Front, result: PolicyResult) -> dict[str, Any]:
    line: dict[str, Any] = {
        "policy": _plain(result.policy.name),
        "kind": result.policy.kind,
        "weights": _plain(result.policy.label),
    }
    for name in front.objectives:
        line |= _columns(name, result.rewards[name])
        line[f"{name}_win_rate"] = (result.win_rates or {}).get(name)
    line |= _columns("kl", result.kl)
    return line | {
        "tokens": result.tokens,
        "finished": result.finished,
        "on_front": result.on_front,
        "dominated_by": " ".join(result.dominated_by),
    }


def _plain(text: str) -> str:
    """Escape a text that a spreadsheet would read as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _columns(name: str, value: Estimate | None) -> dict[str, float | None]:
    numbers = _numbers(value) if value else dict.fromkeys(Estimate._fields)
    return {name if part == "mean" else f"{name}_{part}": number for part, number in numbers.items()}


def _numbers(value: Estimate) -> dict[str, float | None]:
    return {part: None if math.isnan(number) else number for part, number in value._asdict().items()}


def _with_width(value: Estimate) -> str:
    half = (value.high - value.low) / 2
    return f"{value.mean:.3g}" if math.isnan(half) else f"{value.mean:.3g} ± {half:.2g}"
