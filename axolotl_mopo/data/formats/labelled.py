"""Data sets whose own label orders two responses. Every function reads one row."""

import re
from collections.abc import Mapping, Sequence

from axolotl_mopo.data.reading import Reading
from axolotl_mopo.data.rows import (
    Message,
    PreferencePair,
    RatedResponse,
    Row,
    RowError,
    choice,
    column,
    messages,
    score,
    text,
    user,
)
from axolotl_mopo.data.turns import marked_turns

SAFE_RLHF_SCORES = ("better", "safer", "safe")


def read_amopo(row: Row, reading: Reading) -> PreferencePair:
    """The AMoPO authors' file: each side is a mapping of `response` and its scores, which are strings there."""
    prompt = messages(column(row, "prompt"), "prompt")
    sides = []
    for name in ("chosen", "rejected"):
        side = column(row, name)
        if not isinstance(side, Mapping):
            raise RowError(f"its `{name}` is no mapping of a `response` and scores, but {type(side).__name__}")
        scores = {key: score(value) for key, value in side.items() if key != "response"}
        sides.append(RatedResponse(text(side, "response"), scores))
    return PreferencePair(prompt, *sides)


def read_helpsteer2_preference(row: Row, reading: Reading) -> PreferencePair | None:
    """HelpSteer2's preference part: `preference_strength` from -3 to 3, below 0 where the first is better."""
    prompt = marked_turns(text(row, "prompt"))
    return _by_sign(prompt, row, "response_1", "response_2", "preference_strength")


def read_helpsteer3(row: Row, reading: Reading) -> PreferencePair | None:
    """HelpSteer3's preference part: `overall_preference` from -3 to 3, below 0 where the first is better."""
    prompt = messages(column(row, "context"), "context")
    return _by_sign(prompt, row, "response1", "response2", "overall_preference")


def read_safe_rlhf(row: Row, reading: Reading) -> PreferencePair:
    """PKU-SafeRLHF: the objective, `better` or `safer`, picks the label.

    A response's scores are 1 or 0: whether it is the `better`, the `safer` one, and whether it is `safe`.
    """
    first_is = {name: choice(row, f"{name}_response_id", 0, 1) for name in ("better", "safer")}
    responses = []
    for index in (0, 1):
        scores: dict[str, float | None] = {name: float(first == (index == 0)) for name, first in first_is.items()}
        scores["safe"] = score(row.get(f"is_response_{index}_safe"))
        responses.append(RatedResponse(text(row, f"response_{index}"), scores))
    (objective,) = reading.objective
    return _ordered(user(text(row, "prompt")), *responses, first_is_chosen=first_is[objective])


_HH_RLHF_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_hh_rlhf(row: Row, reading: Reading) -> PreferencePair:
    """Anthropic's hh-rlhf: two dialogues in one string each; the last assistant turn is the response."""
    prompts, responses = [], []
    for name in ("chosen", "rejected"):
        *turns, last = _hh_rlhf_dialogue(text(row, name), name)
        if last["role"] != "assistant":
            raise RowError(f"its `{name}` does not end with an assistant's turn")
        prompts.append(turns)
        responses.append(RatedResponse(last["content"], {}))
    if prompts[0] != prompts[1]:
        raise RowError("its two dialogues differ before their last turn", "two different prompts")
    return PreferencePair(prompts[0], *responses)


def read_shp(row: Row, reading: Reading) -> PreferencePair:
    """Stanford Human Preferences: `labels` is 1 where A is preferred, 0 where B is."""
    first, second = (RatedResponse(text(row, f"human_ref_{name}"), {}) for name in "AB")
    return _ordered(user(text(row, "history")), first, second, first_is_chosen=choice(row, "labels", 1, 0))


def read_stack_exchange(row: Row, reading: Reading) -> PreferencePair:
    """Stack Exchange, paired: `response_j` is the preferred one."""
    chosen, rejected = (RatedResponse(text(row, f"response_{name}"), {}) for name in "jk")
    return PreferencePair(user(text(row, "question")), chosen, rejected)


def read_summaries(row: Row, reading: Reading) -> PreferencePair:
    """OpenAI's summarize_from_feedback, comparisons: a post (or a news article) and two summaries.

    The prompt is the bare post, as in arXiv 2310.03708's released code.
    """
    info, summaries = column(row, "info"), column(row, "summaries")
    if not isinstance(info, Mapping) or not (info.get("post") or info.get("article")):
        raise RowError("its `info` has neither a `post` nor an `article`", "empty prompt")
    if not isinstance(summaries, Sequence) or [isinstance(summary, Mapping) for summary in summaries] != [True, True]:
        raise RowError("its `summaries` are not two mappings with a `text`")
    post = text(info, "post" if info.get("post") else "article")
    first, second = (RatedResponse(text(summary, "text"), {}) for summary in summaries)
    return _ordered(user(post), first, second, first_is_chosen=choice(row, "choice", 0, 1))


def _by_sign(prompt: list[Message], row: Row, first: str, second: str, label: str) -> PreferencePair | None:
    strength = score(column(row, label))
    if strength is None:
        raise RowError(f"its `{label}` is {row[label]!r}, not a number", "unknown label")
    if strength == 0:
        return None
    responses = [RatedResponse(text(row, name), {}) for name in (first, second)]
    return _ordered(prompt, *responses, first_is_chosen=strength < 0)


def _ordered(
    prompt: list[Message], first: RatedResponse, second: RatedResponse, *, first_is_chosen: bool
) -> PreferencePair:
    return PreferencePair(prompt, *((first, second) if first_is_chosen else (second, first)))


def _hh_rlhf_dialogue(dialogue: str, name: str) -> list[Message]:
    before, *parts = _HH_RLHF_TURN.split(dialogue)
    if before.strip() or not parts:
        raise RowError(f"its `{name}` does not begin with a turn of Human or Assistant")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
