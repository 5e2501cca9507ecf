"""Directives as Jinja templates, rendered in a sandbox, since a shared YAML is not to be trusted."""

from collections.abc import Set
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

DIMENSION = (
    "Pay attention to one quality above all: {{ dimension }}. On a scale from {{ low }} (fails on {{ dimension }}) to "
    "{{ high }} (nothing left to wish for), give an answer whose {{ dimension }} rates {{ score }}."
)
INTEGRATED = "As an expert, give the answer that does best on all of these together: {{ dimensions | join(', ') }}."

INTEGRATED_VARIABLES = frozenset({"low", "high", "dimensions"})
DIMENSION_VARIABLES = INTEGRATED_VARIABLES | {"dimension", "score"}

_LONGEST_RANGE = 100


def _short_range(*limits: int) -> range:
    numbers = range(*limits)
    if len(numbers) > _LONGEST_RANGE:
        raise SecurityError(f"a range of {len(numbers)} numbers is longer than {_LONGEST_RANGE}")
    return numbers


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which a short expression cannot take all of the memory, or hours."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply numbers, and nothing else."""
        if operator != "*" or not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError("`*` works on numbers only, and `**` not at all")
        return left * right


_SANDBOX = _Sandbox(undefined=StrictUndefined)
_SANDBOX.globals["range"] = _short_range
_EXAMPLE = {"dimension": "helpfulness", "score": 4, "low": 1, "high": 5, "dimensions": ["helpfulness", "correctness"]}


def render(template: str, **variables: Any) -> str:
    """The template's text with its variables filled in."""
    return _SANDBOX.from_string(template).render(**variables)


def check(template: str, variables: Set[str]) -> None:
    """Try a template before any row is read.

    Args:
        template: its text.
        variables: the names that it may use.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        unknown = meta.find_undeclared_variables(_SANDBOX.parse(template)) - variables
    except TemplateSyntaxError as error:
        raise ValueError(f"it is no Jinja template: {error.message}, in line {error.lineno}") from None
    except Exception as error:
        raise ValueError(f"it is no Jinja template that can be read: {error}") from None
    if unknown:
        raise ValueError(f"unknown variable {', '.join(sorted(unknown))}; known are {', '.join(sorted(variables))}")
    try:
        text = render(template, **{name: _EXAMPLE[name] for name in variables})
    except Exception as error:
        raise ValueError(f"it cannot be rendered: {error}") from None
    if not text.strip():
        raise ValueError("it says nothing")
