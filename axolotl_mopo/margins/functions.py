"""A user's own reward function, named by `package.module:function`."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence

from axolotl_mopo.config import ConfigError
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
    except Exception as error:
        raise ConfigError(f"the function {name} cannot be imported: {error}") from None
    if not callable(function):
        raise ConfigError(f"{name} is no function, but {type(function).__name__}")
    return function


def function_digest(name: str) -> str:
    """A name made of the source of the function's module."""
    source = inspect.getsource(inspect.getmodule(import_function(name)) or import_function(name))
    return hashlib.sha256(f"{name}\n{source}".encode()).hexdigest()[:32]
