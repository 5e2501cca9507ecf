"""Pairs that are longer than a sequence may be: what gives way, and in which order."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.tokenizing import shorten, tokenize
from axolotl_mopo.errors import RowError

_LEAST_QUESTION = 32
"""Tokens that stay of a question that is cut; where they have no room, it is the completions that are too long."""


@dataclass
class TokenizedPair:
    """One pair as token ids: D prompts that share both completions, and the texts of the host's length filter."""

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
        """Which prompt is the longest."""
        return max(range(len(self.prompt_ids)), key=lambda index: len(self.prompt_ids[index]))

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompt_ids))

    @property
    def completion_length(self) -> int:
        """Tokens of the longer completion."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


Render = Callable[[list[Message]], list[str]]
"""A conversation -> the texts of its D prompts, directives and chat header included."""


def fit(
    pair: TokenizedPair,
    messages: list[Message],
    render: Render,
    tokenizer: PreTrainedTokenizerBase,
    sequence_len: int,
    strategy: str,
) -> TokenizedPair:
    """Make a pair fit into `sequence_len` tokens.

    The question gives way first: its oldest turns, then the oldest part of its last turn; a system message, the
    directives and the chat header stay. Where the completions are too long even so, they are cut (`truncate`), or the
    pair is returned as it came, for the host to drop and to count (`drop`).

    Args:
        pair: as tokenised in full.
        messages: the conversation.
        render: makes its prompts.
        tokenizer: the run's.
        sequence_len: tokens that a prompt and a completion may have together.
        strategy: the host's `excess_length_strategy`: `drop`, `truncate` or `raise`.

    Raises:
        RowError: where the pair does not fit and the strategy is `raise`.
    """
    needed = pair.prompt_length + pair.completion_length
    if needed <= sequence_len:
        return pair
    if strategy == "raise":
        raise RowError(
            f"it needs {needed} tokens, its directive included, more than sequence_len: {sequence_len}; raise that, or "
            "set excess_length_strategy to drop or truncate",
            "too long",
        )

    def length(messages: list[Message]) -> int:
        return max(map(len, tokenize(tokenizer, render(messages))))

    least = _least(messages, tokenizer)
    kept = length(least)
    if kept + pair.completion_length <= sequence_len:
        prompts = render(_longest(messages, least, length, sequence_len - pair.completion_length))
    elif strategy == "truncate" and kept < sequence_len:
        prompts = render(least)
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


def _least(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """The conversation that is left when the question has given way as far as it does."""
    content = messages[-1]["content"]
    ids = tokenize(tokenizer, [content])[0][-_LEAST_QUESTION:]
    return _from_character(messages, max(0, len(content) - len(str(tokenizer.decode(ids)))))


def _longest(
    messages: list[Message], least: list[Message], length: Callable[[list[Message]], int], room: int
) -> list[Message]:
    """The most of the conversation that has room; its least part has."""
    first = _system_turns(messages)
    for index in range(first + 1, len(messages)):
        rest = messages[:first] + messages[index:]
        if messages[index]["role"] == "user" and length(rest) <= room:
            return rest
    content, kept = messages[-1]["content"], least[-1]["content"]
    starts = range(len(content) - len(kept) + 1)
    return _from_character(
        messages, bisect_left(starts, True, key=lambda c: length(_from_character(messages, c)) <= room)
    )


def _from_character(messages: list[Message], start: int) -> list[Message]:
    """Nothing but the system's turns and the last one from a character on."""
    last = {**messages[-1], "content": messages[-1]["content"][start:]}
    return [*messages[: _system_turns(messages)], last]


def _system_turns(messages: list[Message]) -> int:
    return next(index for index, message in enumerate(messages) if message["role"] != "system")


def _cut(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, limit: int) -> tuple[list[int], str]:
    return (ids, text) if len(ids) <= limit else shorten(tokenizer, ids, limit)
