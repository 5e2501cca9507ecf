"""`source: callable`: a function of the user's own."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.log import warn
from axolotl_mopo.rewards.text import TextSource


class FunctionSource(TextSource):
    """What a user's function returns for prompts (messages) and responses: one float for each response."""

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
        """The function.

        Raises:
            ConfigError: if it cannot be imported or called.
        """
        return import_function(self.function)

    @property
    def code(self) -> str:
        """The function's name."""
        return self.function

    def resolve(self, where: str, run: Mapping[str, Any]) -> Self:
        """Import the function, with a warning; see `RewardSource`."""
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
        said = repr(error) if isinstance(error, SystemExit) else error
        raise ConfigError(f"the function {name} cannot be imported: {said}") from None
    if not callable(function):
        raise ConfigError(f"{name} is no function, but {type(function).__name__}")
    return function
