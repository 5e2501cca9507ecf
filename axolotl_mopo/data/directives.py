"""AMoPO's directives: what the prompt of each dimension says before the question (arXiv 2506.07165, section 3)."""

from collections.abc import Sequence

from axolotl_mopo.config import Directives
from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.templates import render


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
