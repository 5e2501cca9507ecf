"""Token ids of a rendered pair: D prompts, two responses, and the tokens of the responses that are trained on."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.rendering import RenderedResponse, Span
from axolotl_mopo.data.tokenizing import shared_length, tokenize
from axolotl_mopo.errors import RowError

Tokens = Sequence[int]


@dataclass
class TokenizedPair:
    """One pair as token ids: D prompts that share both completions, and the texts for Axolotl's length filter."""

    prompts: list[str]
    chosen: str
    rejected: str
    prompt_ids: list[list[int]]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_spans: list[Span]
    """Ranges of the chosen completion's tokens that are trained on, in order."""
    rejected_spans: list[Span]
    header_tokens: int = 0
    """Tokens at the end of every rendered prompt that belong to the completions, since a response changes them."""
    header_characters: int = 0
    cut_prompt_tokens: int = 0
    cut_completion_tokens: int = 0

    @property
    def longest(self) -> int:
        """Index of the longest prompt."""
        return max(range(len(self.prompt_ids)), key=lambda index: len(self.prompt_ids[index]))

    @property
    def prompt_length(self) -> int:
        """Number of tokens of the longest prompt."""
        return max(map(len, self.prompt_ids))

    @property
    def completion_length(self) -> int:
        """Number of tokens of the longer completion."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class PairTexts:
    """The texts of a pair that are tokenised.

    A tokenizer may merge the end of the prompt with the beginning of a response into one token. The completions begin
    with the first token in which the prompt and the prompt with a response differ, so that prompt and completion
    together are the tokens of the whole conversation. To find it, the texts are tokenised from the last control token
    of the prompt on, since no token crosses a control token.
    """

    prompts: Sequence[str]
    """The D prompts."""
    plain: str
    """The prompt without directives."""
    chosen: RenderedResponse
    rejected: RenderedResponse
    control_tokens: re.Pattern[str]

    @property
    def texts(self) -> list[str]:
        """All texts to tokenise, in the order that `assemble` expects."""
        return [*self.prompts, self.plain[self._cut :], *self._side(self.chosen), *self._side(self.rejected)]

    def assemble(self, tokenizer: PreTrainedTokenizerBase, ids: Iterator[list[int]]) -> TokenizedPair:
        """Return the tokenised pair, given the token ids of `texts`.

        Raises:
            RowError: if the prompts end with different tokens, so that their completions would differ.
        """
        prompt_ids = [next(ids) for _ in self.prompts]
        plain, chosen = next(ids), next(ids)
        chosen_borders = [next(ids) for _ in self._borders(self.chosen)]
        rejected = next(ids)
        rejected_borders = [next(ids) for _ in self._borders(self.rejected)]
        shared = min(shared_length(plain, chosen), shared_length(plain, rejected))
        header = plain[shared:]
        if header and any(prompt[-len(header) :] != header for prompt in prompt_ids):
            raise RowError(
                "the tokens of the responses cannot be separated from those of the prompts; choose another "
                "`chat_template:`"
            )
        kept = [prompt[: len(prompt) - len(header)] for prompt in prompt_ids]
        shown = str(tokenizer.decode(header)) if header else ""
        cut = len(shown) if self.plain.endswith(shown) else len(self.plain) - self._start
        return TokenizedPair(
            [prompt[: len(prompt) - cut] for prompt in self.prompts],
            self.chosen.whole[len(self.plain) - cut :],
            self.rejected.whole[len(self.plain) - cut :],
            kept,
            chosen[shared:],
            rejected[shared:],
            self._spans(self.chosen, chosen, chosen_borders, shared),
            self._spans(self.rejected, rejected, rejected_borders, shared),
            len(header),
            cut,
        )

    @property
    def _start(self) -> int:
        """Number of characters that the prompt and both wholes share."""
        return min(self.chosen.start, self.rejected.start)

    @cached_property
    def _cut(self) -> int:
        """Where the last control token begins that the prompt and both wholes share."""
        found = list(self.control_tokens.finditer(self.plain, 0, self._start))
        return found[-1].start() if found else 0

    def _side(self, response: RenderedResponse) -> list[str]:
        ends = (response.whole[self._cut : border] for border in self._borders(response))
        return [response.whole[self._cut :], *ends]

    def _borders(self, response: RenderedResponse) -> list[int]:
        """Return the characters whose tokens must be found: all borders of spans but the beginning and the end."""
        ends = (response.start, len(response.whole))
        return [border for span in response.spans for border in span if border not in ends]

    def _spans(self, response: RenderedResponse, ids: Tokens, borders: Sequence[Tokens], shared: int) -> list[Span]:
        """Convert the spans of a response from characters to tokens of its completion.

        A token that crosses a border belongs to what follows.
        """
        found = {response.start: 0, len(response.whole): len(ids) - shared}
        for border, before in zip(self._borders(response), borders, strict=True):
            found[border] = max(0, shared_length(before, ids) - shared)
        spans = [(found[start], found[end]) for start, end in response.spans if found[start] < found[end]]
        if not spans:
            raise RowError("no token of its response is trained on; leave the row out", "nothing to train on")
        return spans


def tokenize_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[PairTexts]) -> Iterator[list[int]]:
    """Yield the token ids of the texts of several pairs, tokenised together."""
    return iter(tokenize(tokenizer, [text for pair in pairs for text in pair.texts]))
