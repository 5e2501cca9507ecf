"""AMoPO's directives: what the prompt of each dimension says beside the question (arXiv 2506.07165, section 3)."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from axolotl_mopo.config import DimensionsBlock, Directives
from axolotl_mopo.data.entries import AMoPOData
from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.sandbox import render
from axolotl_mopo.data.templates import dimension_values, integrated_values

DirectiveSettings = DimensionsBlock | AMoPOData
"""What says how directives are worded: the YAML block, or the part of it that prepared rows depend on."""


class Directive(NamedTuple):
    """What stands around the question in the user's turn; one of the two is empty."""

    before: str
    after: str

    def around(self, question: str) -> str:
        """The user's turn."""
        return f"{self.before}{question}{self.after}"


def training_directives(settings: DirectiveSettings, scores: Mapping[str, float]) -> list[Directive]:
    """The directives of the D prompts of a pair.

    Args:
        settings: AMoPO's.
        scores: the chosen response's score of every dimension, within `score_range`.

    Raises:
        ValueError: where a template cannot be rendered with these scores.
    """
    common = (settings.dimensions, settings.score_range)
    first = [integrated_directive(settings.directives, *common)] if settings.integrated else []
    others = [dimension_directive(settings.directives, name, scores[name], *common) for name in settings.dimensions]
    return [_placed(text, settings) for text in first + others]


def inference_directive(
    settings: DirectiveSettings, dimension: str | None = None, score: float | None = None
) -> Directive:
    """The directive to ask a trained model with: the integrated one, or one dimension at a score, by default the best.

    Raises:
        ValueError: where the model was not trained with such a prompt, or a template cannot be rendered.
    """
    common = (settings.dimensions, settings.score_range)
    if dimension is None:
        if score is not None:
            raise ValueError("a score needs a dimension; the integrated prompt has none")
        if not settings.integrated:
            raise ValueError(
                f"`integrated` is false, so there is no integrated prompt; choose one dimension of "
                f"{', '.join(settings.dimensions)}"
            )
        return _placed(integrated_directive(settings.directives, *common), settings)
    if dimension not in settings.dimensions:
        raise ValueError(f"unknown dimension {dimension}; known are {', '.join(settings.dimensions)}")
    low, high = settings.score_range
    score = high if score is None else score
    if not low <= score <= high:
        raise ValueError(f"the score {score:g} is outside `score_range`, {low:g} to {high:g}")
    return _placed(dimension_directive(settings.directives, dimension, score, *common), settings)


def user_template(directive: Directive) -> str:
    """What the user's turn says, with `{question}` where the question stands."""
    return directive.around("{question}")


def with_directive_in_template(chat_template: str, directive: Directive) -> str:
    """A chat template that puts the directive into the last user turn by itself, as `with_directive` does."""
    before, after = (json.dumps(text, ensure_ascii=False) for text in directive)
    return (
        "{% set mopo = namespace(last=-1) %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}{% set mopo.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% if mopo.last >= 0 %}{% set messages = messages[:mopo.last] + [{'role': 'user', 'content': "
        f"{before} ~ messages[mopo.last]['content'] ~ {after}"
        "}] + messages[mopo.last + 1:] %}{% endif %}{{ '' }}"
        f"{chat_template}"
    )


def integrated_directive(directives: Directives, dimensions: Sequence[str], score_range: tuple[float, float]) -> str:
    """Ask for all dimensions together, without a score.

    Raises:
        ValueError: where the template cannot be rendered.
    """
    try:
        return render(directives.integrated, integrated_values(dimensions, score_range))
    except ValueError as error:
        raise ValueError(f"the directive `integrated` cannot be rendered: {error}; change the template") from None


def dimension_directive(
    directives: Directives,
    dimension: str,
    score: float,
    dimensions: Sequence[str],
    score_range: tuple[float, float],
) -> str:
    """Ask for one dimension at a score within `score_range`, the worst and the best.

    Raises:
        ValueError: where the template cannot be rendered with this score.
    """
    values = dimension_values(dimension, score, dimensions, score_range)
    try:
        return render(directives.dimension, values)
    except ValueError as error:
        raise ValueError(
            f"the directive `dimension` cannot be rendered for {dimension} at the score {values['score']}: {error}; "
            "change the template"
        ) from None


def with_directive(messages: Sequence[Message], directive: Directive) -> list[Message]:
    """The conversation with the directive in its last user turn, the one that is answered."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    turn = {**messages[last], "content": directive.around(messages[last]["content"])}
    return [*messages[:last], turn, *messages[last + 1 :]]


def _placed(text: str, settings: DirectiveSettings) -> Directive:
    return Directive(f"{text}\n\n", "") if settings.directive_position == "before" else Directive("", f"\n\n{text}")
