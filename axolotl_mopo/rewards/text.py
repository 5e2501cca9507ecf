"""Base class of sources that compute rewards from texts: prompts (messages) and a response to each of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from axolotl_mopo.config.sources import TRAINING_KEYS, Responses, RewardSource
from axolotl_mopo.data.rows import Message
from axolotl_mopo.digests import source_digest
from axolotl_mopo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Rewards(Protocol):
    """Computes the rewards of a batch."""

    def __call__(
        self,
        prompts: list[list[Message]],
        responses: list[str],
        numbers: Sequence[int],
        reasoning: Sequence[str | None] | None = None,
    ) -> list[float]:
        """Compute one reward for each response.

        Args:
            prompts: the conversations that the responses answer.
            responses: one response to each prompt, without its reasoning.
            numbers: the numbers of their rows, for messages.
            reasoning: the reasoning of each response, where the rewards are of reasoning and answer; None for a
                response without reasoning.
        """


class TextSource(RewardSource):
    """A source that computes rewards from texts. A source in another package derives from it and defines `compute`."""

    batch_size: int = Field(
        64, ge=1, strict=True, description="Number of responses that are scored at a time, at least 1."
    )

    needs_texts: ClassVar = True

    def compute(self, prompts: list[list[Message]], responses: list[str]) -> Sequence[float]:
        """Compute the rewards of a batch.

        Args:
            prompts: the conversations that the responses answer.
            responses: one response to each prompt.

        Returns:
            One finite number for each response.
        """
        raise NotImplementedError

    @property
    def implementation(self) -> Callable[..., Any]:
        """The function that computes the rewards; the source code of its module is part of the digest."""
        return self.compute

    @property
    def code(self) -> str | None:
        """The name of the code that computes the rewards, for messages; None for a model."""
        return type(self).__name__

    def content_digest(self) -> str:
        """Return a digest of the source's settings and of the source code of the function's module.

        Raises:
            ConfigError: if the function has no Python source code.
        """
        settings = self.model_dump_json(exclude={*TRAINING_KEYS, "batch_size"})
        try:
            return source_digest(self.implementation, settings)
        except (OSError, TypeError):
            raise ConfigError(
                f"{self.code} has no Python source code, which the cache needs to detect changes of the function; call "
                "it from a function in a module of your own"
            ) from None

    @contextmanager
    def opened(self, device: "torch.device") -> Iterator[Rewards]:
        """Context manager that loads what is needed and yields the function that computes the rewards of a batch.

        Raises:
            ConfigError: if the source cannot be used.
            DataError: from the yielded function, if `compute` raises, or does not return one finite number for each
                response; names the code and the row.
        """
        from axolotl_mopo.data.reasoning import joined

        function, name = self.implementation, self.code

        def rewards(
            prompts: list[list[Message]],
            responses: list[str],
            numbers: Sequence[int],
            reasoning: Sequence[str | None] | None = None,
        ) -> list[float]:
            if reasoning is not None:
                responses = [joined(*both) for both in zip(reasoning, responses, strict=True)]
            where = f"{name}, called with {len(responses)} responses, the first from row {numbers[0]},"
            try:
                values = [float(value) for value in function(prompts, responses)]
            except (Exception, SystemExit) as error:
                raise DataError(f"{where} raised {error!r}") from error
            if len(values) != len(responses):
                raise DataError(f"{where} returned {len(values)} numbers; it must return one for each response")
            for number, prompt, value in zip(numbers, prompts, values, strict=True):
                if not math.isfinite(value):
                    raise DataError(
                        f"{name} returned {value} for row {number}, {prompt[-1]['content']!r:.80}; it must be a finite "
                        "number"
                    )
            return values

        yield rewards

    def rewards(self, responses: Responses) -> "Tensor":
        """See `RewardSource`."""
        return responses.text_rewards(self)
