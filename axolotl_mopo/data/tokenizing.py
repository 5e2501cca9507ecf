"""Turn rendered conversations into token ids."""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.rows import PreferencePair, texts_of


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of the special tokens of a tokenizer, such as its end-of-turn token."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return _any_of({*added, *tokenizer.all_special_tokens} - {""})


class ControlTokenCount:
    """Counts the pairs whose texts contain a control token of the tokenizer, such as its end-of-turn token.

    The tokenizer cannot distinguish such a text from the token that the chat template writes.

    Args:
        tokenizer: the tokenizer of the run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pattern = control_tokens(tokenizer)
        self.pairs = 0
        self.first_row: int | None = None
        self.found: Counter[str] = Counter()
        """Number of pairs that contain each token."""

    def watch(self, pairs: Iterable[tuple[int, PreferencePair]]) -> Iterator[tuple[int, PreferencePair]]:
        """Yield the pairs unchanged and count those with control tokens."""
        for number, pair in pairs:
            turns = [*pair.prompt, *pair.chosen.messages, *pair.rejected.messages]
            others = [turn["tool_calls"] for turn in turns if turn.get("tool_calls")] + [*pair.inputs.to_row().values()]
            texts = (*texts_of(turns), *(json.dumps(other, ensure_ascii=False) for other in others))
            if found := {token for text in texts for token in self._pattern.findall(text)}:
                self.pairs += 1
                self.found.update(found)
                self.first_row = number if self.first_row is None else self.first_row
            yield number, pair


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest of these texts.

    There may be hundreds, so texts with the same first two characters share a branch.
    """
    branches: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        branches.setdefault(token[:2], []).append(re.escape(token[2:]))
    return re.compile("|".join(f"{re.escape(head)}(?:{'|'.join(rest)})" for head, rest in branches.items()) or "(?!)")


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the items that two texts, or two lists, both begin with."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: one[:length] != other[:length])


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Tokenise texts that contain their special tokens already."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def shorten(tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: int) -> tuple[list[int], str]:
    """Return the first tokens, at most `limit`, and a text that has no more tokens than `limit`."""
    ids = ids[:limit]
    while len(tokenize(tokenizer, [text := str(tokenizer.decode(ids))])[0]) > limit:
        ids = ids[:-1]
    return ids, text
