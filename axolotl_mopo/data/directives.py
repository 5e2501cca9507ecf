"""AMoPO's directives: what the prompt of each dimension says before the question (arXiv 2506.07165, section 3)."""

import json
from collections.abc import Mapping, Sequence

from axolotl_mopo.config import AMoPOConfig, Directives
from axolotl_mopo.data.entries import AMoPOData
from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.templates import render

DirectiveSettings = AMoPOConfig | AMoPOData
"""What says how directives are worded: the YAML block, or the part of it that prepared rows depend on."""


def training_directives(settings: DirectiveSettings, scores: Mapping[str, float]) -> list[str]:
    """The directives of the D prompts of a pair.

    Args:
        settings: AMoPO's.
        scores: the chosen response's score of every dimension, within `score_range`.
    """
    common = (settings.dimensions, settings.score_range)
    first = [integrated_directive(settings.directives, *common)] if settings.integrated else []
    return first + [
        dimension_directive(settings.directives, name, scores[name], *common) for name in settings.dimensions
    ]


def inference_directive(settings: DirectiveSettings, dimension: str | None = None, score: float | None = None) -> str:
    """The directive to ask a trained model with: the integrated one, or one dimension at a score, by default the best.

    Raises:
        ValueError: where the model was not trained with such a prompt.
    """
    common = (settings.dimensions, settings.score_range)
    if dimension is None:
        if score is not None:
            raise ValueError("a score needs a dimension; the integrated prompt has none")
        if not settings.integrated:
            raise ValueError(
                f"`amopo.integrated` is false, so there is no integrated prompt; choose one dimension of "
                f"{', '.join(settings.dimensions)}"
            )
        return integrated_directive(settings.directives, *common)
    if dimension not in settings.dimensions:
        raise ValueError(f"unknown dimension {dimension}; known are {', '.join(settings.dimensions)}")
    low, high = settings.score_range
    score = high if score is None else score
    if not low <= score <= high:
        raise ValueError(f"the score {score:g} is outside `amopo.score_range`, {low:g} to {high:g}")
    return dimension_directive(settings.directives, dimension, score, *common)


def user_template(directive: str) -> str:
    """What the user's turn says, with `{question}` where the question stands."""
    return f"{directive}\n\n{{question}}"


def with_directive_in_template(chat_template: str, directive: str) -> str:
    """A chat template that puts the directive in front of the last user turn by itself, as `with_directive` does."""
    return (
        "{% set mopo = namespace(last=-1) %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}{% set mopo.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% if mopo.last >= 0 %}{% set messages = messages[:mopo.last] + [{'role': 'user', 'content': "
        + json.dumps(f"{directive}\n\n", ensure_ascii=False)
        + " ~ messages[mopo.last]['content']}] + messages[mopo.last + 1:] %}{% endif %}{{ '' }}"
        + chat_template
    )


def integrated_directive(directives: Directives, dimensions: Sequence[str], score_range: tuple[float, float]) -> str:
    """Ask for all dimensions together, without a score."""
    low, high = map(_number, score_range)
    return render(directives.integrated, dimensions=_readable(dimensions), low=low, high=high)


def dimension_directive(
    directives: Directives,
    dimension: str,
    score: float,
    dimensions: Sequence[str],
    score_range: tuple[float, float],
) -> str:
    """Ask for one dimension at a score within `score_range`, the worst and the best."""
    low, high = map(_number, score_range)
    (name,) = _readable([dimension])
    return render(
        directives.dimension,
        dimension=name,
        score=_number(score),
        dimensions=_readable(dimensions),
        low=low,
        high=high,
    )


def with_directive(messages: Sequence[Message], directive: str) -> list[Message]:
    """The conversation with the directive in front of its last user turn, the one that is answered."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    turn = {**messages[last], "content": f"{directive}\n\n{messages[last]['content']}"}
    return [*messages[:last], turn, *messages[last + 1 :]]


def _readable(dimensions: Sequence[str]) -> list[str]:
    return [dimension.replace("_", " ") for dimension in dimensions]


def _number(value: float) -> float:
    """A score as one would write it: 4 and not 4.0, 3.33 and not 3.3333333."""
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded
