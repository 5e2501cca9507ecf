"""A small subset of Jinja for untrusted templates, with limits on memory and time.

Jinja parses a template, and then every node is checked: a node that is not listed here is refused. A node that could
make a long value is wrapped in a filter that checks the length first, so no expression can take more than a few
megabytes. Every loop and every filter takes steps from a budget.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeGuard

from jinja2 import StrictUndefined, Template, Undefined, nodes, pass_context
from jinja2.exceptions import TemplateSyntaxError
from jinja2.filters import do_capitalize, do_float, do_int, do_round, do_title, do_trim
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST_TEMPLATE = 10_000
"""Characters."""

_LONGEST_VALUE = 10_000
_LONGEST_OUTPUT = 100_000
_MOST_ELEMENTS = 1_000
_LARGEST_NUMBER = 10**15
_DEEPEST_NESTING = 50
_DEEPEST_LOOP = 2
_STEPS = 100_000
"""Approximate limit on the nodes evaluated in one rendering; a deterministic bound on loops."""
_SECONDS = 0.5
"""Limit on the CPU time of one rendering, in case a step is slower than expected."""
_LONGEST_ERROR = 200

_LOOP_ATTRIBUTES = (
    *("cycle", "depth", "depth0", "first", "index", "index0", "last", "length"),
    *("nextitem", "previtem", "revindex", "revindex0"),
)
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Name, nodes.Const, nodes.CondExpr),
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Filter, nodes.Test, nodes.Call),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Neg, nodes.Pos, nodes.Concat),
)
_TESTS = (
    *("defined", "undefined", "odd", "even", "divisibleby", "none", "boolean", "true", "false", "integer", "float"),
    *("number", "string", "sequence", "lower", "upper", "in", "==", "eq", "equalto", "!=", "ne", ">", "gt"),
    *("greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"),
)
# Names of the wrapping filters and of the budget; no template can write them, since they contain a space.
_BUDGET, _BOUNDED, _JOINED, _LOOP = "the budget", "is bounded", "is joined", "is looped over"


class SandboxError(ValueError):
    """A template that is refused or cannot be rendered; the message gives the reason."""


@dataclass
class _Budget:
    """Steps and CPU time that one rendering has left."""

    steps: int = _STEPS
    deadline: float = field(default_factory=lambda: time.thread_time() + _SECONDS)

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0 or time.thread_time() > self.deadline:
            raise SandboxError("it takes too long; shorten its loops and lists")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _scalar_size(value: Any) -> int:
    """Approximate number of characters of a text, a number, true, false or none."""
    if isinstance(value, str):
        return len(value)
    if _is_number(value):
        if not abs(value) <= _LARGEST_NUMBER:
            raise SandboxError(f"a number is larger than {_LARGEST_NUMBER:,}")
        return 4
    if isinstance(value, Undefined):
        return len(str(value))  # raises if a variable is missing
    if value is not None:
        raise SandboxError(f"a {type(value).__name__} is not allowed; use a text, a number or a flat list of these")
    return 4


def _size(value: Any) -> int:
    if not isinstance(value, list | tuple | range | dict):
        return _scalar_size(value)
    _refuse_more(len(value), _MOST_ELEMENTS, "elements")
    parts = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
    return sum(map(_scalar_size, parts)) + 2 * len(value)


def _refuse_more(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise SandboxError(f"{count:,} {what} are more than the limit of {limit:,}")


@pass_context
def _bounded(context: Context, value: Any) -> Any:
    """Return the value and take steps for it from the budget; raise SandboxError if it is too long."""
    size = _size(value)
    _refuse_more(size, _LONGEST_VALUE, "characters of one value")
    context[_BUDGET].spend(1 + size // 100)
    return value


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    _refuse_more(sum(map(_size, parts)), _LONGEST_VALUE, "characters of one value")
    return str(_bounded(context, "".join(map(str, parts))))


@pass_context
def _looped(context: Context, value: Any, nodes_within: int) -> list[Any]:
    items = list(_elements(_bounded(context, value)))
    context[_BUDGET].spend(len(items) * nodes_within)
    return items


def _elements(value: Any) -> Sequence[Any]:
    if isinstance(value, str | list | tuple | range | dict):
        _refuse_more(len(value), _MOST_ELEMENTS, "elements")
        return value if isinstance(value, str | list | tuple | range) else list(value)
    raise SandboxError(f"a {type(value).__name__} has no elements")


def _join(value: Any, between: str = "") -> str:
    parts = [str(part) for part in _elements(value)]
    _refuse_more(
        sum(map(len, parts)) + len(between) * max(len(parts) - 1, 0), _LONGEST_VALUE, "characters of one value"
    )
    return between.join(parts)


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = str(value)
    found = text.count(old) if count < 0 else min(count, text.count(old))
    _refuse_more(len(text) + found * len(new), _LONGEST_VALUE, "characters of one value")
    return text.replace(old, new, count)


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _sort(value: Any, reverse: bool = False, case_sensitive: bool = False) -> list[Any]:
    return sorted(_elements(value), key=None if case_sensitive else _folded, reverse=bool(reverse))


def _unique(value: Any) -> list[Any]:
    return list({_folded(part): part for part in reversed(_elements(value))}.values())[::-1]


def _reverse(value: Any) -> Any:
    return value[::-1] if isinstance(value, str) else list(_elements(value))[::-1]


def _sum(value: Any, start: float = 0) -> float:
    return sum((_number(part) for part in _elements(value)), _number(start))


def _number(value: Any) -> float:
    if not _is_number(value):
        raise SandboxError(f"a number is needed, not a {type(value).__name__}")
    return value


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    if not -15 <= precision <= 15:
        raise SandboxError("`round` takes a precision of -15 to 15")
    return do_round(_number(value), precision, method)  # type: ignore[arg-type]


def _absolute(value: Any) -> float:
    return abs(_number(value))


_FILTERS: dict[str, Callable[..., Any]] = {
    "abs": _absolute,
    "capitalize": lambda value: do_capitalize(str(value)),
    "count": lambda value: len(_elements(value)),
    "first": lambda value: _elements(value)[0],
    "float": do_float,
    "int": do_int,
    "join": _join,
    "last": lambda value: _elements(value)[-1],
    "length": lambda value: len(_elements(value)),
    "list": lambda value: list(_elements(value)),
    "lower": lambda value: str(value).lower(),
    "max": lambda value: max(_elements(value), key=_folded),
    "min": lambda value: min(_elements(value), key=_folded),
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "sort": _sort,
    "string": str,
    "sum": _sum,
    "title": lambda value: do_title(str(value)),
    "trim": lambda value, characters=None: do_trim(str(value), characters),
    "unique": _unique,
    "upper": lambda value: str(value).upper(),
}
"""Filters for directives; arguments and results are bounded, and no result is over three times its arguments."""


def _as_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        for given in (value, *args, *kwargs.values()):
            _bounded(context, given)
        return _bounded(context, function(value, *args, **kwargs))

    return bounded


@pass_context
def _default(context: Context, value: Any, otherwise: Any = "", boolean: bool = False) -> Any:
    missing = isinstance(value, Undefined) or (boolean and not value)
    return _bounded(context, otherwise if missing else value)


@pass_context
def _map(context: Context, value: Any, name: str, *args: Any) -> list[Any]:
    applied = context.environment.call_filter
    parts = _elements(_bounded(context, value))
    return list(_bounded(context, [applied(name, part, args, context=context) for part in parts]))


@pass_context
def _select(context: Context, value: Any, *test: Any) -> list[Any]:
    return list(_bounded(context, [part for part in _elements(value) if _passes(context, part, *test)]))


@pass_context
def _reject(context: Context, value: Any, *test: Any) -> list[Any]:
    return list(_bounded(context, [part for part in _elements(value) if not _passes(context, part, *test)]))


def _passes(context: Context, value: Any, name: str | None = None, *args: Any) -> bool:
    for given in args:
        _bounded(context, given)
    return bool(value if name is None else context.environment.call_test(name, value, args, context=context))


def _short_range(*limits: int) -> range:
    numbers = range(*limits)
    _refuse_more(len(numbers), _MOST_ELEMENTS, "numbers of a range")
    return numbers


class _Environment(ImmutableSandboxedEnvironment):
    """Renders the trees that `_Checker` returns; a second line of defence."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute with numbers; concatenate texts or lists."""
        for given in (left, right):
            _bounded(context, given)
        texts = operator == "+" and isinstance(left, str | list) and type(left) is type(right)
        if not texts and not (_is_number(left) and _is_number(right)):
            raise SandboxError(f"`{operator}` works on numbers only")
        return _bounded(context, self.binop_table[operator](left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow attributes of loops only."""
        return isinstance(obj, LoopContext) and attr in _LOOP_ATTRIBUTES

    def wrap_str_format(self, value: Any) -> None:
        """Allow no formatting, since its width has no limit."""


_ENVIRONMENT = _Environment(
    undefined=StrictUndefined, optimized=False, finalize=_bounded, cache_size=0, auto_reload=False
)
_ENVIRONMENT.globals = {"range": _short_range}
_ENVIRONMENT.filters = {
    **{name: _as_filter(function) for name, function in _FILTERS.items()},
    **{"d": _default, "default": _default, "map": _map, "reject": _reject, "select": _select},
}
_KNOWN_FILTERS = tuple(sorted(_ENVIRONMENT.filters))
_ENVIRONMENT.filters |= {_BOUNDED: _bounded, _JOINED: _joined, _LOOP: _looped}
_ENVIRONMENT.tests = {name: _ENVIRONMENT.tests[name] for name in _TESTS}


class _Checker(NodeTransformer):
    """Refuses every unknown node, and wraps nodes that make values in a filter."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self._depth = 0
        self._loops: list[set[str]] = []

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if type(node) not in _NODES:
            raise SandboxError(
                f"it may contain only variables, conditions, filters and loops, {_DEEPEST_LOOP} deep; "
                f"line {node.lineno} contains {type(node).__name__}"
            )
        self._depth += 1
        if self._depth > _DEEPEST_NESTING:
            raise SandboxError(f"its expressions and conditions are nested more than {_DEEPEST_NESTING} deep")
        visited = super().visit(node, *args, **kwargs)
        self._depth -= 1
        return visited

    def _inner(self, node: Any) -> Any:
        """Visit the parts of a node and return the node."""
        return self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        if node.recursive or len(self._loops) == _DEEPEST_LOOP:
            raise SandboxError(f"loops may be nested {_DEEPEST_LOOP} deep and must not be recursive")
        within = sum(1 for _ in node.find_all(nodes.Node))
        node.iter = _around(self.visit(node.iter), _LOOP, nodes.Const(within))
        targets = node.target.items if isinstance(node.target, nodes.Tuple) else [node.target]
        if not all(isinstance(target, nodes.Name) for target in targets):
            raise SandboxError("the variables of a loop must be names")
        self._loops.append({"loop", *(target.name for target in targets)})  # type: ignore[attr-defined]
        node.body = [self.visit(child) for child in node.body]
        node.test = node.test and self.visit(node.test)
        self._loops.pop()
        node.else_ = [self.visit(child) for child in node.else_]
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Name:  # noqa: N802
        if not any(node.name in names for names in self._loops):
            self.used.add(node.name)
        return node

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Getattr:  # noqa: N802
        if not (isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in _LOOP_ATTRIBUTES):
            raise SandboxError(f"it reads the attribute `{node.attr[:40]}`; only those of `loop` can be read")
        return self._inner(node)

    def visit_Call(self, node: nodes.Call) -> nodes.Call:  # noqa: N802
        called = node.node
        known = isinstance(called, nodes.Name) and called.name == "range"
        if not (known or (isinstance(called, nodes.Getattr) and called.attr == "cycle")):
            raise SandboxError("it calls a function; only `range` and `loop.cycle` can be called")
        if known:
            node.args = [self.visit(child) for child in _plain(node)]
            return node
        _plain(node)
        return self._inner(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:  # noqa: N802
        if node.node is None or node.name not in _KNOWN_FILTERS:
            raise SandboxError(f"unknown filter `{node.name[:40]}`; the known filters are {', '.join(_KNOWN_FILTERS)}")
        _plain(node)
        return self._inner(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Test:  # noqa: N802
        if node.name not in _TESTS:
            raise SandboxError(f"unknown test `{node.name[:40]}`; the known tests are {', '.join(_TESTS)}")
        _plain(node)
        node = self._inner(node)
        node.args = [_around(given, _BOUNDED) for given in node.args]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        node = self._inner(node)
        node.expr = _around(node.expr, _BOUNDED)
        for operand in node.ops:
            operand.expr = _around(operand.expr, _BOUNDED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        node = self._inner(node)
        return _around(nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), _JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Filter:  # noqa: N802
        return _around(self._inner(node), _BOUNDED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Filter:  # noqa: N802
        return _around(self._inner(node), _BOUNDED)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:  # noqa: N802
        return _around(self._inner(node), _BOUNDED)


def _plain(node: Any) -> list[nodes.Expr]:
    """The arguments of a call, a filter or a test; raises SandboxError if one is unpacked with `*` or `**`."""
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise SandboxError("arguments with `*` or `**` are not allowed; write them one by one")
    return node.args


def _around(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    place = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Filter(node, name, list(args), [], None, None, **place)


@dataclass(frozen=True)
class _Compiled:
    template: Template
    used: frozenset[str]
    """Names of the variables that the template needs."""


@lru_cache(maxsize=256)
def _compiled(text: str) -> _Compiled:
    _refuse_more(len(text), LONGEST_TEMPLATE, "characters of a template")
    check_unicode(text)
    checker = _Checker()
    try:
        template = _ENVIRONMENT.from_string(checker.visit(_ENVIRONMENT.parse(text)))
    except SandboxError:
        raise
    except TemplateSyntaxError as error:
        raise SandboxError(f"it is not a valid Jinja template: {_short(error)}, in line {error.lineno}") from None
    except Exception as error:  # such as too deep a recursion or too long a number
        raise SandboxError(f"it cannot be parsed as a Jinja template: {_short(error)}") from None
    return _Compiled(template, frozenset(checker.used - set(_ENVIRONMENT.globals)))


def variables(text: str) -> frozenset[str]:
    """Names of the variables that a template needs.

    Raises:
        SandboxError: if the template contains a node that is not allowed.
    """
    return _compiled(text).used


def render(text: str, values: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
        text: the template.
        values: values of its variables: texts, numbers, and flat lists of these.

    Raises:
        SandboxError: if the template cannot be rendered, the text is too long, or rendering takes too long.
    """
    compiled = _compiled(text)
    for value in values.values():
        _refuse_more(_size(value), _LONGEST_VALUE, "characters of one value")
    try:
        rendered = "".join(_limited(compiled.template.generate({**values, _BUDGET: _Budget()})))
    except SandboxError:
        raise
    except Exception as error:
        raise SandboxError(_short(error)) from None
    check_unicode(rendered)
    return rendered


def check_unicode(text: str) -> None:
    """Refuse a text that cannot be written as UTF-8, which tokenizers need.

    Raises:
        SandboxError: if there is a lone surrogate; names the first one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SandboxError(
            f"{ascii(text[error.start])[1:-1]} at character {error.start} is half of a surrogate pair, which is not "
            "valid Unicode; remove it"
        ) from None


def _limited(pieces: Iterable[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        _refuse_more(total, _LONGEST_OUTPUT, "characters of the rendered text")
        yield piece


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:_LONGEST_ERROR]
