"""`source: callable`: a function of the user."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.log import warn
from axolotl_mopo.rewards.text import TextSource


class FunctionSource(TextSource):
    """The reward is what a function of the user returns for a prompt (messages) and a response."""

    source: Literal["callable"]
    function: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description=(
            "Function that returns one reward for each response: package.module:function. It is given prompts "
            "(messages) and responses (texts)."
        ),
    )

    argument: ClassVar = "function"

    @property
    def implementation(self) -> Callable[..., Any]:
        """The imported function.

        Raises:
            ConfigError: if it cannot be imported or called.
        """
        return import_function(self.function)

    @property
    def code(self) -> str:
        """The function's name."""
        return self.function

    def resolve(self, where: str, run: Mapping[str, Any]) -> Self:
        """Warn and import the function; see `RewardSource`."""
        warn("%s.function` imports and runs the code of %s.", where, self.function)
        try:
            self.content_digest()
        except ConfigError as error:
            raise ConfigError(f"{where}.function`: {error}") from None
        return self


def import_function(name: str) -> Callable[..., Any]:
    """Import `package.module:function`.

    Raises:
        ConfigError: if it cannot be imported or called.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        reason = repr(error) if isinstance(error, SystemExit) else error
        raise ConfigError(f"the function {name} cannot be imported: {reason}") from None
    if not callable(function):
        raise ConfigError(
            f"{name} is not a function, but an object of type {type(function).__name__}; give package.module:function"
        )
    return function
