"""Shorten pairs that are longer than `sequence_len`."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.pair_tokens import TokenizedPair
from axolotl_mopo.data.rendering import Span
from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.tokenizing import shorten, tokenize
from axolotl_mopo.errors import RowError

_MIN_QUESTION_TOKENS = 32
"""Tokens that remain of a truncated question; if even these do not fit, the completions are too long."""


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
    directives, the chat header and what follows the last user turn (tool calls and their results) are kept.
    If the completions are still too long, they are truncated (`truncate`), or
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
        return max(map(len, tokenize(tokenizer, render(messages)))) - pair.header_tokens

    shortest = _shortest(messages, tokenizer)
    kept = length(shortest)
    if kept + pair.completion_length <= sequence_len:
        prompts = render(_longest(messages, shortest, length, sequence_len - pair.completion_length))
    elif strategy == "truncate" and kept < sequence_len:
        prompts = render(shortest)
    else:
        return pair
    prompt_ids = [ids[: len(ids) - pair.header_tokens] for ids in tokenize(tokenizer, prompts)]
    prompt_length = max(map(len, prompt_ids))
    room = sequence_len - prompt_length
    chosen_ids, chosen = _cut(tokenizer, pair.chosen_ids, pair.chosen, room)
    rejected_ids, rejected = _cut(tokenizer, pair.rejected_ids, pair.rejected, room)
    chosen_spans = _within(pair.chosen_spans, len(chosen_ids))
    rejected_spans = _within(pair.rejected_spans, len(rejected_ids))
    if not (chosen_spans and rejected_spans):  # nothing that is trained on would be left
        return pair
    return replace(
        pair,
        prompts=[prompt[: len(prompt) - pair.header_characters] for prompt in prompts],
        chosen=chosen,
        rejected=rejected,
        prompt_ids=prompt_ids,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        chosen_spans=chosen_spans,
        rejected_spans=rejected_spans,
        cut_prompt_tokens=pair.prompt_length - prompt_length,
        cut_completion_tokens=pair.completion_length - max(len(chosen_ids), len(rejected_ids)),
    )


def _shortest(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[Message]:
    """Return the conversation with the question truncated as much as possible."""
    content = messages[_question(messages)]["content"]
    ids = tokenize(tokenizer, [content])[0][-_MIN_QUESTION_TOKENS:]
    return _from_character(messages, max(0, len(content) - len(str(tokenizer.decode(ids)))))


def _longest(
    messages: list[Message], shortest: list[Message], length: Callable[[list[Message]], int], limit: int
) -> list[Message]:
    """Return the longest part of the conversation with at most `limit` tokens; `shortest` must have no more."""
    first, last = _system_turns(messages), _question(messages)
    for index in range(first + 1, last + 1):
        rest = messages[:first] + messages[index:]
        if messages[index]["role"] == "user" and length(rest) <= limit:
            return rest
    content, kept = messages[last]["content"], shortest[first]["content"]
    starts = range(len(content) - len(kept) + 1)
    return _from_character(
        messages, bisect_left(starts, True, key=lambda c: length(_from_character(messages, c)) <= limit)
    )


def _from_character(messages: list[Message], start: int) -> list[Message]:
    """Return the system turns, the last user turn from the character `start` on, and the turns after it."""
    last = _question(messages)
    question = {**messages[last], "content": messages[last]["content"][start:]}
    return [*messages[: _system_turns(messages)], question, *messages[last + 1 :]]


def _question(messages: list[Message]) -> int:
    """Index of the last user turn."""
    return max(index for index, message in enumerate(messages) if message["role"] == "user")


def _system_turns(messages: list[Message]) -> int:
    return next(index for index, message in enumerate(messages) if message["role"] != "system")


def _cut(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, limit: int) -> tuple[list[int], str]:
    return (ids, text) if len(ids) <= limit else shorten(tokenizer, ids, limit)


def _within(spans: Sequence[Span], limit: int) -> list[Span]:
    """Return the parts of spans before `limit`."""
    return [(start, min(end, limit)) for start, end in spans if start < limit]
