"""Shorten pairs that are longer than `sequence_len`."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.tokenizing import shorten, tokenize
from axolotl_mopo.errors import RowError

_MIN_QUESTION_TOKENS = 32
"""Tokens that remain of a truncated question; if even these do not fit, the completions are too long."""


@dataclass
class TokenizedPair:
    """One pair as token ids: D prompts that share both completions, and the texts for Axolotl's length filter."""

    prompts: list[str]
    chosen: str
    rejected: str
    prompt_ids: list[list[int]]
    chosen_ids: list[int]
    rejected_ids: list[int]
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


Render = Callable[[list[Message]], list[str]]
"""Turns a conversation into the texts of its D prompts, including the directives and the chat header."""


def fit(
    pair: TokenizedPair,
    messages: list[Message],
    render: Render,
    tokenizer: PreTrainedTokenizerBase,
    sequence_len: int,
    strategy: str,
) -> TokenizedPair:
    """Shorten a pair to `sequence_len` tokens.

    The question is truncated first: its oldest turns, then the beginning of its last turn. A system message, the
    directives and the chat header are kept. If the completions are still too long, they are truncated (`truncate`), or
    the pair is returned unchanged so that Axolotl drops and counts it (`drop`).

    Args:
        pair: the pair, tokenised in full.
        messages: the conversation.
        render: renders its prompts.
        tokenizer: the tokenizer of the run.
        sequence_len: maximum number of tokens of a prompt and a completion together.
        strategy: Axolotl's `excess_length_strategy`: `drop`, `truncate` or `raise`.

    Raises:
        RowError: if the pair does not fit and the strategy is `raise`.
    """
    needed = pair.prompt_length + pair.completion_length
    if needed <= sequence_len:
        return pair
    if strategy == "raise":
        raise RowError(
            f"it needs {needed} tokens including its directive, more than sequence_len: {sequence_len}; increase "
            "sequence_len, or set excess_length_strategy to drop or truncate",
            "too long",
        )

    def length(messages: list[Message]) -> int:
        return max(map(len, tokenize(tokenizer, render(messages))))

    shortest = _shortest(messages, tokenizer)
    kept = length(shortest)
    if kept + pair.completion_length <= sequence_len:
        prompts = render(_longest(messages, shortest, length, sequence_len - pair.completion_length))
    elif strategy == "truncate" and kept < sequence_len:
        prompts = render(shortest)
    else:
        return pair
    prompt_ids = tokenize(tokenizer, prompts)
    prompt_length = max(map(len, prompt_ids))
    chosen_ids, chosen = _cut(tokenizer, pair.chosen_ids, pair.chosen, sequence_len - prompt_length)
    rejected_ids, rejected = _cut(tokenizer, pair.rejected_ids, pair.rejected, sequence_len - prompt_length)
    return TokenizedPair(
        prompts,
        chosen,
        rejected,
        prompt_ids,
        chosen_ids,
        rejected_ids,
        cut_prompt_tokens=pair.prompt_length - prompt_length,
        cut_completion_tokens=pair.completion_length - max(len(chosen_ids), len(rejected_ids)),
    )


def _shortest(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """Return the conversation with the question truncated as much as possible."""
    content = messages[-1]["content"]
    ids = tokenize(tokenizer, [content])[0][-_MIN_QUESTION_TOKENS:]
    return _from_character(messages, max(0, len(content) - len(str(tokenizer.decode(ids)))))


def _longest(
    messages: list[Message], shortest: list[Message], length: Callable[[list[Message]], int], limit: int
) -> list[Message]:
    """Return the longest part of the conversation with at most `limit` tokens; `shortest` must have no more."""
    first = _system_turns(messages)
    for index in range(first + 1, len(messages)):
        rest = messages[:first] + messages[index:]
        if messages[index]["role"] == "user" and length(rest) <= limit:
            return rest
    content, kept = messages[-1]["content"], shortest[-1]["content"]
    starts = range(len(content) - len(kept) + 1)
    return _from_character(
        messages, bisect_left(starts, True, key=lambda c: length(_from_character(messages, c)) <= limit)
    )


def _from_character(messages: list[Message], start: int) -> list[Message]:
    """Return the system turns and the last turn from the character `start` on."""
    last = {**messages[-1], "content": messages[-1]["content"][start:]}
    return [*messages[: _system_turns(messages)], last]


def _system_turns(messages: list[Message]) -> int:
    return next(index for index, message in enumerate(messages) if message["role"] != "system")


def _cut(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, limit: int) -> tuple[list[int], str]:
    return (ids, text) if len(ids) <= limit else shorten(tokenizer, ids, limit)
