"""Data sets with a label that orders two responses. Every function reads one row."""

import re
from collections.abc import Mapping, Sequence
from typing import cast

from axolotl_mopo.data.conversations import marked_turns, messages, response, user
from axolotl_mopo.data.formats.joined import RATED_COLUMNS
from axolotl_mopo.data.formats.rated import helpsteer_scores
from axolotl_mopo.data.options import EntryOptions, ObjectiveOptions, SHPOptions
from axolotl_mopo.data.rows import Message, PreferencePair, RatedResponse, Row, choice, column, score, text
from axolotl_mopo.errors import RowError

SAFE_RLHF_SCALES = {"better": (0.0, 1.0), "safer": (0.0, 1.0), "safe": (0.0, 1.0), "severity_level": (0.0, 3.0)}


def read_amopo(row: Row, options: EntryOptions) -> PreferencePair:
    """Read the AMoPO authors' file: each side is a mapping of `response` and its scores, which are strings.

    Its prompts come from HelpSteer2, so a string may contain several marked turns.
    """
    prompt = column(row, "prompt")
    turns = marked_turns(text(row, "prompt")) if isinstance(prompt, str) else messages(prompt, "prompt")
    sides = []
    for name in ("chosen", "rejected"):
        side = column(row, name)
        if not isinstance(side, Mapping):
            raise RowError(f"its `{name}` must be a mapping of a `response` and scores, not {type(side).__name__}")
        scores = {key: score(value) for key, value in side.items() if key != "response"}
        sides.append(RatedResponse(text(side, "response"), scores))
    return PreferencePair(turns, sides[0], sides[1])


def read_helpsteer2_preference(row: Row, options: EntryOptions) -> PreferencePair | None:
    """Read HelpSteer2's preference part: `preference_strength` from -3 to 3, below 0 if the first is better.

    Ratings come from another file that is joined, or from columns such as `helpfulness_1`; otherwise there are no
    scores.
    """
    turns = marked_turns(text(row, "prompt"))
    first_is_better = _first_is_better(row, "preference_strength")
    if first_is_better is None:
        return None
    is_rated = any(name in RATED_COLUMNS for name in row)
    responses = [
        RatedResponse(text(row, f"response_{number}"), helpsteer_scores(row, f"_{number}") if is_rated else {})
        for number in (1, 2)
    ]
    return _ordered(turns, *responses, first_is_chosen=first_is_better)


def read_helpsteer3(row: Row, options: EntryOptions) -> PreferencePair | None:
    """Read HelpSteer3's preference part: `overall_preference` from -3 to 3, below 0 if the first is better."""
    prompt = messages(column(row, "context"), "context")
    first_is_better = _first_is_better(row, "overall_preference")
    if first_is_better is None:
        return None
    responses = [RatedResponse(text(row, name), {}) for name in ("response1", "response2")]
    return _ordered(prompt, *responses, first_is_chosen=first_is_better)


def read_safe_rlhf(row: Row, options: EntryOptions) -> PreferencePair:
    """Read PKU-SafeRLHF: the objective, `better` or `safer`, selects the label.

    The scores of a response are `better`, `safer` and `safe`, each 1 or 0, and `severity_level`, 0 to 3 with higher
    values worse, if the data has its columns.
    """
    first_is = {name: choice(row, f"{name}_response_id", 0, 1) for name in ("better", "safer")}
    responses = []
    for index in (0, 1):
        scores: dict[str, float | None] = {name: float(first == (index == 0)) for name, first in first_is.items()}
        scores["safe"] = score(row.get(f"is_response_{index}_safe"))
        if (severity := f"response_{index}_severity_level") in row:
            scores["severity_level"] = score(row[severity])
        responses.append(RatedResponse(text(row, f"response_{index}"), scores))
    (objective,) = cast(ObjectiveOptions, options).objectives
    return _ordered(user(text(row, "prompt")), *responses, first_is_chosen=first_is[objective])


_HH_RLHF_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_hh_rlhf(row: Row, options: EntryOptions) -> PreferencePair:
    """Read Anthropic's hh-rlhf: two dialogues, each one string; the last assistant turn is the response."""
    prompts, responses = [], []
    for name in ("chosen", "rejected"):
        *turns, last = _hh_rlhf_dialogue(text(row, name), name)
        if last["role"] != "assistant":
            raise RowError(f"its `{name}` must end with an assistant turn")
        prompts.append(turns)
        responses.append(RatedResponse(last["content"], {}))
    if prompts[0] != prompts[1]:
        raise RowError("its two dialogues differ before their last turn", "two different prompts")
    return PreferencePair(prompts[0], responses[0], responses[1])


def read_shp(row: Row, options: EntryOptions) -> PreferencePair:
    """Read Stanford Human Preferences: `labels` is 1 if A is preferred, 0 if B is."""
    first, second = (RatedResponse(text(row, f"human_ref_{name}"), {}) for name in "AB")
    return _ordered(user(text(row, "history")), first, second, first_is_chosen=choice(row, "labels", 1, 0))


def below_score_ratio(row: Row, options: SHPOptions) -> str | None:
    """Leave out a pair whose `score_ratio` is below the entry's `min_score_ratio`.

    Raises:
        RowError: if `min_score_ratio` is set and the row's `score_ratio` is not a number.
    """
    if options.min_score_ratio is None:
        return None
    ratio = score(column(row, "score_ratio"))
    if ratio is None:
        raise RowError(f"its `score_ratio` is {row['score_ratio']!r:.60}, not a number", "unknown label")
    least = options.min_score_ratio
    return f"pairs whose score_ratio is below {least:g}" if ratio < least else None


_ARENA_TIES = ("tie", "tie (bothbad)", "both_bad")


def read_arena(row: Row, options: EntryOptions) -> PreferencePair | None:
    """Read Chatbot Arena: two conversations whose last turns are the responses; `winner` names the better one."""
    if column(row, "winner") in _ARENA_TIES:
        return None
    prompts, responses = [], []
    for name in ("conversation_a", "conversation_b"):
        turns = messages(column(row, name), name)
        prompts.append(turns[:-1])
        responses.append(response(turns[-1:], name, {}))
    if prompts[0] != prompts[1]:
        raise RowError("its two conversations differ before their last turn", "two different prompts")
    return _ordered(prompts[0], *responses, first_is_chosen=choice(row, "winner", "model_a", "model_b"))


def read_stack_exchange(row: Row, options: EntryOptions) -> PreferencePair:
    """Read paired Stack Exchange answers: `response_j` is the preferred one."""
    chosen, rejected = (RatedResponse(text(row, f"response_{name}"), {}) for name in "jk")
    return PreferencePair(user(text(row, "question")), chosen, rejected)


def read_summaries(row: Row, options: EntryOptions) -> PreferencePair:
    """Read the comparisons of OpenAI's summarize_from_feedback: a post (or a news article) and two summaries.

    The prompt is the post alone, as in the released code of arXiv 2310.03708.
    """
    info, summaries = column(row, "info"), column(row, "summaries")
    if not isinstance(info, Mapping) or not (info.get("post") or info.get("article")):
        raise RowError("its `info` has neither a `post` nor an `article`", "empty prompt")
    if not isinstance(summaries, Sequence) or [isinstance(summary, Mapping) for summary in summaries] != [True, True]:
        raise RowError("its `summaries` must be two mappings with a `text`")
    post = text(info, "post" if info.get("post") else "article")
    first, second = (RatedResponse(text(summary, "text"), {}) for summary in summaries)
    return _ordered(user(post), first, second, first_is_chosen=choice(row, "choice", 0, 1))


def _first_is_better(row: Row, label: str) -> bool | None:
    """Whether the sign of a label prefers the first response; None for a tie."""
    strength = score(column(row, label))
    if strength is None:
        raise RowError(f"its `{label}` is {row[label]!r}, not a number", "unknown label")
    if abs(strength) > _STRONGEST:
        raise RowError(
            f"its `{label}` is {strength:g}, outside -{_STRONGEST} to {_STRONGEST}; such rows have no preference",
            "unknown label",
        )
    return strength < 0 if strength else None


_STRONGEST = 3


def _ordered(
    prompt: list[Message], first: RatedResponse, second: RatedResponse, *, first_is_chosen: bool
) -> PreferencePair:
    return PreferencePair(prompt, *((first, second) if first_is_chosen else (second, first)))


def _hh_rlhf_dialogue(dialogue: str, name: str) -> list[Message]:
    before, *parts = _HH_RLHF_TURN.split(dialogue)
    if before.strip() or not parts:
        raise RowError(f"its `{name}` must begin with a turn of Human or Assistant")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
