"""AMoPO's directives: what the prompt of each dimension says before the question (arXiv 2506.07165, section 3)."""

from collections.abc import Sequence

from axolotl_mopo.data.rows import Message


def integrated_directive(dimensions: Sequence[str]) -> str:
    """Ask for all dimensions together, without a score."""
    return f"As an expert, give the answer that does best on all of these together: {_listed(dimensions)}."


def dimension_directive(dimension: str, score: float, low: float, high: float) -> str:
    """Ask for one dimension at a score between `low`, the worst, and `high`, the best."""
    name = _readable(dimension)
    return (
        f"Pay attention to one quality above all: {name}. On a scale from {low:g} (fails on {name}) to {high:g} "
        f"(nothing left to wish for), give an answer whose {name} rates {score:.3g}."
    )


def with_directive(messages: Sequence[Message], directive: str) -> list[Message]:
    """The conversation with the directive in front of its last user turn, the one that is answered."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    turn = {**messages[last], "content": f"{directive}\n\n{messages[last]['content']}"}
    return [*messages[:last], turn, *messages[last + 1 :]]


def _readable(dimension: str) -> str:
    return dimension.replace("_", " ")


def _listed(dimensions: Sequence[str]) -> str:
    names = [_readable(dimension) for dimension in dimensions]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
