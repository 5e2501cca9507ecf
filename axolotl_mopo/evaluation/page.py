"""Render a front as one HTML file without external resources: hover for values, click a point for its responses."""

import json
from typing import Any

from jinja2 import Environment, PackageLoader

from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.report import notes, to_json
from axolotl_mopo.evaluation.statistics import Front

# Responses are text of a model: autoescape keeps them from becoming markup or code.
_PAGES = Environment(loader=PackageLoader("axolotl_mopo.evaluation"), autoescape=True)


def render(front: Front, comparison: Comparison, prompts: int) -> str:
    """Render the page.

    Args:
        front: the front to show.
        comparison: has the responses.
        prompts: number of prompts to show with their responses.
    """
    content = json.loads(to_json(front))
    for policy, result in zip(content["policies"], front.results, strict=True):
        policy["label"] = result.policy.label
        policy["responses"] = _responses(front, comparison, policy["name"], prompts)
    content["conversations"] = _conversations(front, comparison, prompts)
    lines = notes(front)
    if prompts < front.prompts:
        lines.append(f"The responses to the first {prompts:,} prompts are shown.")
    return _PAGES.get_template("page.html.jinja").render(content=content, notes=lines)


def _conversations(front: Front, comparison: Comparison, prompts: int) -> list[Any]:
    rows = comparison.responses(front.results[0].policy.name)
    return [row["prompt"] for row in rows if row["sample"] == 0][:prompts]


def _responses(front: Front, comparison: Comparison, policy: str, prompts: int) -> list[list[dict[str, Any]]]:
    """The responses of a policy to every shown prompt, with their scores."""
    shown: list[list[dict[str, Any]]] = [[] for _ in range(min(prompts, front.prompts))]
    for row in comparison.responses(policy):
        if row["prompt_id"] < len(shown):
            scores = {name: row[name] for name in front.objectives}  # type: ignore[literal-required]
            reasoning = {"reasoning": row["reasoning"]} if "reasoning" in row else {}
            text = {"text": row["response"], **reasoning}
            shown[row["prompt_id"]].append({**text, "finished": row["finished"], "scores": scores})
    return shown
