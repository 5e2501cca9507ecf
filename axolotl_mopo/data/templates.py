"""Directives as Jinja templates, rendered in a sandbox, since a shared YAML is not to be trusted."""

from collections.abc import Set
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

DIMENSION = (
    "Pay attention to one quality above all: {{ dimension }}. On a scale from {{ low }} (fails on {{ dimension }}) to "
    "{{ high }} (nothing left to wish for), give an answer whose {{ dimension }} rates {{ score }}."
)
INTEGRATED = "As an expert, give the answer that does best on all of these together: {{ dimensions | join(', ') }}."

INTEGRATED_VARIABLES = frozenset({"low", "high", "dimensions"})
DIMENSION_VARIABLES = INTEGRATED_VARIABLES | {"dimension", "score"}

_LONGEST_RANGE = 1000
_LONGEST_TEXT = 100_000
_DEEPEST_LOOP = 2
_REFUSED = (nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.CallBlock, nodes.FilterBlock)
"""Statements by which a text can be made of itself again and again."""
_REFUSED_FILTERS = ("center", "format", "indent", "wordwrap", "xmlattr", "urlize", "batch", "slice")
"""Filters that fill up, to whatever width they are told."""


def _short_range(*limits: int) -> range:
    numbers = range(*limits)
    if len(numbers) > _LONGEST_RANGE:
        raise SecurityError(f"a range of {len(numbers)} numbers is longer than {_LONGEST_RANGE}")
    return numbers


def _short_replace(text: str, old: str, new: str) -> str:
    if len(text) + str(text).count(old) * len(new) > _LONGEST_TEXT:
        raise SecurityError(f"a text would be longer than {_LONGEST_TEXT:,} characters")
    return str(text).replace(old, new)


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which a short expression cannot take all of the memory, or hours."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply numbers and take remainders, and nothing else."""
        if operator == "**" or not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError("`*` and `%` work on numbers only, and `**` not at all")
        return left * right if operator == "*" else left % right

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What a loop knows of itself; nothing else has attributes."""
        return isinstance(obj, LoopContext) and super().is_safe_attribute(obj, attr, value)


_SANDBOX = _Sandbox(undefined=StrictUndefined)
_SANDBOX.globals = {"range": _short_range}
_SANDBOX.filters = {name: _SANDBOX.filters[name] for name in _SANDBOX.filters if name not in _REFUSED_FILTERS}
_SANDBOX.filters["replace"] = _short_replace
_EXAMPLE = {"dimension": "helpfulness", "score": 4, "low": 1, "high": 5, "dimensions": ["helpfulness", "correctness"]}


def render(template: str, **variables: Any) -> str:
    """The template's text with its variables filled in."""
    return _SANDBOX.from_string(template).render(**variables)


def readable_number(value: float) -> float:
    """A score as one would write it: 4 and not 4.0, 3.33 and not 3.3333333."""
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


def check(template: str, variables: Set[str], **values: Any) -> None:
    """Try a template before any row is read.

    Args:
        template: its text.
        variables: the names that it may use.
        values: of some of them, in the place of an example's.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        tree = _SANDBOX.parse(template)
        unknown = meta.find_undeclared_variables(tree) - variables
    except TemplateSyntaxError as error:
        raise ValueError(f"it is no Jinja template: {error.message}, in line {error.lineno}") from None
    except Exception as error:
        raise ValueError(f"it is no Jinja template that can be read: {error}") from None
    if next(tree.find_all(_REFUSED), None) or _depth(tree) > _DEEPEST_LOOP:
        raise ValueError(
            f"it may hold variables, conditions, filters and loops, {_DEEPEST_LOOP} deep, and nothing else"
        )
    if unknown:
        raise ValueError(f"unknown variable {', '.join(sorted(unknown))}; known are {', '.join(sorted(variables))}")
    try:
        text = render(template, **{name: (_EXAMPLE | values)[name] for name in variables})
    except Exception as error:
        raise ValueError(f"it cannot be rendered: {error}") from None
    if not text.strip():
        raise ValueError("it says nothing")


def _depth(node: nodes.Node) -> int:
    """How many loops stand within one another."""
    return isinstance(node, nodes.For) + max(map(_depth, node.iter_child_nodes()), default=0)
