"""What sources have in common whose rewards are computed from texts: prompts (messages) and a response to each."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from axolotl_mopo.config.sources import TRAINING_KEYS, Responses, RewardSource
from axolotl_mopo.data.rows import Message
from axolotl_mopo.digests import source_digest
from axolotl_mopo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Rewards = Callable[[list[list[Message]], list[str], Sequence[int]], list[float]]
"""Prompts, one response to each, and the numbers of their rows -> a reward of each response."""


class TextSource(RewardSource):
    """A source that computes rewards from texts. A source of another package derives from it and gives `compute`."""

    batch_size: int = Field(
        64, ge=1, strict=True, description="Number of responses that are scored at a time, at least 1."
    )

    needs_texts: ClassVar = True

    def compute(self, prompts: list[list[Message]], responses: list[str]) -> Sequence[float]:
        """The rewards of a batch.

        Args:
            prompts: the conversations that the responses answer.
            responses: one to each.

        Returns:
            One finite number for each response.
        """
        raise NotImplementedError

    @property
    def implementation(self) -> Callable[..., Any]:
        """The function that computes the rewards; its module's source code is part of the digest."""
        return self.compute

    @property
    def code(self) -> str | None:
        """The name of the code that computes the rewards, for messages; None for a model."""
        return type(self).__name__

    def content_digest(self) -> str:
        """A digest of the source's own settings and of the source code of the function's module.

        Raises:
            ConfigError: if there is no source code.
        """
        settings = self.model_dump_json(exclude={*TRAINING_KEYS, "batch_size"})
        try:
            return source_digest(self.implementation, settings)
        except (OSError, TypeError):
            raise ConfigError(
                f"{self.code} has no Python source, by which its rewards could be known again; call it from a "
                "function in a module of your own"
            ) from None

    @contextmanager
    def opened(self, device: "torch.device") -> Iterator[Rewards]:
        """What computes the rewards of a batch, with whatever it needs in memory for a while.

        Raises:
            ConfigError: if the source cannot be used.
            DataError: from the result, if `compute` raises, or returns something else than a finite number for each
                response; naming the code and the row.
        """
        function, name = self.implementation, self.code

        def rewards(prompts: list[list[Message]], responses: list[str], numbers: Sequence[int]) -> list[float]:
            where = f"{name}, called with {len(responses)} responses, of row {numbers[0]} the first,"
            try:
                values = [float(value) for value in function(prompts, responses)]
            except (Exception, SystemExit) as error:
                raise DataError(f"{where} raised {error!r}") from error
            if len(values) != len(responses):
                raise DataError(f"{where} returned {len(values)} numbers")
            for number, prompt, value in zip(numbers, prompts, values, strict=True):
                if not math.isfinite(value):
                    raise DataError(f"{name} returned {value} for row {number}, {prompt[-1]['content']!r:.80}")
            return values

        yield rewards

    def rewards(self, responses: Responses) -> "Tensor":
        """See `RewardSource`."""
        return responses.text_rewards(self)
