"""Data sets with ratings of single responses; pairs are made from the responses to one prompt."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_mopo.data.conversations import marked_turns, messages, response, user
from axolotl_mopo.data.options import ResponsesOptions
from axolotl_mopo.data.rows import Message, RatedResponse, Row, column, score, text
from axolotl_mopo.errors import RowError

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK_ATTRIBUTES = ("instruction_following", "honesty", "truthfulness", "helpfulness")
OVERALL = "overall"
RESPONSE_COLUMNS = (
    "prompt_id",
    "sample",
    "prompt",
    "response",
    "reasoning",
    "reasoning_tokens",
    "token_ids",
    "finished",
    "logp",
    "ref_logp",
    "tools",
    "chat_template_kwargs",
)
"""The columns that `axolotl mopo generate` writes for a response, or reads of a prompt; other columns are scores."""


def read_helpsteer(row: Row) -> tuple[list[Message], list[RatedResponse]]:
    """Read HelpSteer and HelpSteer2: a row is one response."""
    return marked_turns(text(row, "prompt")), [RatedResponse(text(row, "response"), helpsteer_scores(row))]


def helpsteer_scores(row: Row, suffix: str = "") -> dict[str, float | None]:
    """Return the five attributes in columns whose names end with `suffix`, and `overall`, their mean."""
    scores = {name: score(row.get(f"{name}{suffix}")) for name in HELPSTEER_ATTRIBUTES}
    return scores | {OVERALL: mean(scores, HELPSTEER_ATTRIBUTES)}


def read_responses(row: Row) -> tuple[list[Message], list[RatedResponse]]:
    """Read the output of `axolotl mopo score`: a row is one response; columns not in `RESPONSE_COLUMNS` are scores."""
    scores = {name: score(value) for name, value in row.items() if name not in RESPONSE_COLUMNS}
    reasoning = {"reasoning_content": row["reasoning"]} if row.get("reasoning") else {}
    turn = {"role": "assistant", "content": text(row, "response"), **reasoning}
    return messages(column(row, "prompt"), "prompt"), [response(messages([turn], "response"), "response", scores)]


def unfinished(row: Row, options: ResponsesOptions) -> str | None:
    """Leave out a response that was cut off at the token limit; it would be trained on with an end-of-turn token.

    Raises:
        RowError: if `finished` is neither true nor false.
    """
    finished = row.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise RowError(f"its `finished` is {finished!r:.60}; it must be true or false", "unknown label")
    return "responses that were cut off" if finished is False and not options.keep_unfinished else None


def read_ultrafeedback(row: Row) -> tuple[list[Message], list[RatedResponse]]:
    """Read UltraFeedback: a row holds all responses to an instruction; a rating may be "N/A"."""
    completions = column(row, "completions")
    if not isinstance(completions, Sequence) or not all(isinstance(entry, Mapping) for entry in completions):
        raise RowError("its `completions` must be a list of mappings")
    return user(text(row, "instruction")), [_ultrafeedback_response(completion) for completion in completions]


def mean(scores: Mapping[str, float | None], names: Sequence[str]) -> float | None:
    """Return the mean of the named scores; None if one of them is missing."""
    values = [scores.get(name) for name in names]
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(names) if len(present) == len(names) else None


def _ultrafeedback_response(completion: Row) -> RatedResponse:
    annotations = completion.get("annotations") or {}
    scores = {name: score(_rating(annotations, name)) for name in ULTRAFEEDBACK_ATTRIBUTES}
    # A null response counts as an empty one, which does not affect the other responses of the row.
    response = text({"response": completion.get("response") or ""}, "response")
    return RatedResponse(response, scores | {OVERALL: score(completion.get("overall_score"))})


def _rating(annotations: Any, name: str) -> Any:
    annotation = (annotations.get(name) or {}) if isinstance(annotations, Mapping) else None
    if not isinstance(annotation, Mapping):
        raise RowError("the `annotations` of a completion must be mappings with a `Rating`")
    return annotation.get("Rating")
