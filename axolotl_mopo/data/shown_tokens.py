"""Show which tokens of a pair are trained on, for `axolotl mopo directives` and `axolotl preprocess --debug`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import click
from transformers import PreTrainedTokenizerBase

_SIDES = ("chosen", "rejected")


def responses(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the tokens of both responses of a prepared row, each with `id`, `text` and `trained`."""
    return {side: _tokens(tokenizer, row[f"{side}_input_ids"], row[f"{side}_spans"]) for side in _SIDES}


def as_text(shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the responses as text: what is trained on is green and between >> and <<, the rest is dim."""
    return "\n\n".join(f"=== {side}: {_count(tokens)}\n{_marked(tokens)}" for side, tokens in shown.items())


def row_as_text(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str:
    """Return the prompts and the responses of a prepared row as text."""
    prompts = [tokenizer.decode(ids) for ids in row["prompt_input_ids"]]
    shown = [f"=== prompt {number}\n{_printable(str(text))}" for number, text in enumerate(prompts)]
    return "\n\n".join([*shown, as_text(responses(tokenizer, row))])


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], spans: Sequence[int]) -> list[dict[str, Any]]:
    trained = {position for start, end in zip(spans[::2], spans[1::2], strict=True) for position in range(start, end)}
    return [
        {"id": int(token), "text": str(tokenizer.decode([token])), "trained": position in trained}
        for position, token in enumerate(ids)
    ]


def _count(tokens: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(token['trained'] for token in tokens)} of {len(tokens)} tokens are trained on"


def _marked(tokens: Sequence[Mapping[str, Any]]) -> str:
    return "".join(_parts(tokens))


def _parts(tokens: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for is_trained, group in groupby(tokens, key=lambda token: token["trained"]):
        text = _printable("".join(token["text"] for token in group))
        yield click.style(f">>{text}<<", fg="green") if is_trained else click.style(text, dim=True)


def _printable(text: str) -> str:
    """Escape control characters, with which a text could change what the terminal shows."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
