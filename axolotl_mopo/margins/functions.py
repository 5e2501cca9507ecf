"""Reward functions: a user's own, named by `package.module:function`, and those that sources bring along."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence

from axolotl_mopo.config import CallableMargin, ConfigError, MarginBlock, TextMargin
from axolotl_mopo.data.rows import Message

RewardFunction = Callable[[list[list[Message]], list[str]], Sequence[float]]
"""Prompts and one response to each -> their rewards."""


def import_function(name: str) -> RewardFunction:
    """Import `package.module:function`.

    Raises:
        ConfigError: where it cannot be imported or called.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        said = repr(error) if isinstance(error, SystemExit) else error
        raise ConfigError(f"the function {name} cannot be imported: {said}") from None
    if not callable(function):
        raise ConfigError(f"{name} is no function, but {type(function).__name__}")
    return function


def reward_function(margin: TextMargin) -> RewardFunction:
    """What computes a margin of texts."""
    return import_function(margin.function) if isinstance(margin, CallableMargin) else margin.rewards


def function_name(margin: TextMargin) -> str:
    """The function, or the class of a source that brings its own, for messages."""
    return margin.function if isinstance(margin, CallableMargin) else type(margin).__name__


def function_digest(margin: TextMargin) -> str:
    """A name made of the margin's own settings and of the source of the function's module.

    Raises:
        ConfigError: where it has none.
    """
    settings = margin.model_dump_json(exclude={*MarginBlock.model_fields, "batch_size"})
    function = reward_function(margin)
    try:
        source = inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        raise ConfigError(
            f"{function_name(margin)} has no Python source, by which its rewards could be known again; call it from a "
            "function in a module of your own"
        ) from None
    return hashlib.sha256(f"{settings}\n{source}".encode()).hexdigest()[:32]
