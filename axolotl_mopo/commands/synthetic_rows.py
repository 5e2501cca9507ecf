"""Make up rows in the format of a data-set entry, for a configuration whose data is not available."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_mopo.data.formats.rated import HELPSTEER_ATTRIBUTES, ULTRAFEEDBACK_ATTRIBUTES

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A question, two answers to it, and their scores."""

    number: int
    prompt: str
    good: str
    bad: str
    good_scores: Mapping[str, float]
    bad_scores: Mapping[str, float]

    @property
    def first_is_good(self) -> bool:
        """Whether the good answer is the first one, for formats with a label."""
        return self.number % 2 == 0

    @property
    def sides(self) -> list[tuple[str, Mapping[str, float]]]:
        """The two answers with their scores, in the order of the row."""
        both = [(self.good, self.good_scores), (self.bad, self.bad_scores)]
        return both if self.first_is_good else both[::-1]


def made_up_rows(
    kind: str, entry: Mapping[str, Any], scales: Mapping[str, tuple[float, float]], count: int
) -> list[Row] | None:
    """Make up rows of one of this package's formats.

    Args:
        kind: name of the format.
        entry: keys of the data-set entry.
        scales: the scores that a row needs, with their lowest and highest values.
        count: number of pairs that the rows give.

    Returns:
        The rows; None if the format belongs to another package.
    """
    if kind not in _MAKERS:
        return None
    where = entry.get("where") or {}
    made = (_MAKERS[kind](example, entry) for example in examples(scales, count))
    return [{**row, **where} for rows in made for row in rows]


def examples(scales: Mapping[str, tuple[float, float]], count: int) -> list[Example]:
    """Questions with answers of different lengths and with different scores."""
    names = list(enumerate(scales.items()))
    return [
        Example(
            number,
            f"Question {number}: what is {number} plus {number + 3}?",
            f"{number} plus {number + 3} is {2 * number + 3}." + " I hope that helps." * (number % 3),
            "I do not know." + f" Ask somebody else about {number}, please." * (number % 2),
            {
                name: _between(scale, (2 + (number + index) % 2) / 3)
                for index, (name, scale) in enumerate(scales.items())
            },
            {name: _between(scale, ((number + index) % 3) / 3) for index, (name, scale) in names},
        )
        for number in range(count)
    ]


def _between(scale: tuple[float, float], part: float) -> float:
    return float(round(scale[0] + (scale[1] - scale[0]) * part))


def _pairs(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    sides = {"chosen": (example.good, example.good_scores), "rejected": (example.bad, example.bad_scores)}
    row: Row = {entry.get("field_prompt") or "prompt": example.prompt}
    if entry.get("field_system"):
        row[entry["field_system"]] = "You answer questions."
    for side, (answer, scores) in sides.items():
        column = entry.get(f"field_{side}") or side
        row[column] = answer
        field = entry.get(f"field_{side}_scores") or f"{column}_scores"
        if "{}" in field:
            row |= {field.replace("{}", name): value for name, value in scores.items()}
        elif scores:
            row[field] = dict(scores)
    return [row]


def _amopo(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    sides = {"chosen": (example.good, example.good_scores), "rejected": (example.bad, example.bad_scores)}
    return [
        {"prompt": example.prompt}
        | {
            side: {"response": answer, **{name: str(value) for name, value in scores.items()}}
            for side, (answer, scores) in sides.items()
        }
    ]


def _helpsteer(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    return [
        {"prompt": example.prompt, "response": answer, **_attributes(example, answer, scores)}
        for answer, scores in example.sides
    ]


def _attributes(example: Example, answer: str, scores: Mapping[str, float]) -> Row:
    """All attributes of HelpSteer. Those that are not needed differ too, so that any of them can order the pairs."""
    own = 3 if answer == example.good else 1
    return {name: int(scores.get(name, own + (name == "verbosity"))) for name in HELPSTEER_ATTRIBUTES}


def _helpsteer2(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    if "ratings" not in entry and "preference" not in str(entry.get("data_files")):
        return _helpsteer(example, entry)
    row: Row = {"prompt": example.prompt, "preference_strength": -2 if example.first_is_good else 2, "split": "train"}
    for number, (answer, scores) in enumerate(example.sides, 1):
        row[f"response_{number}"] = answer
        if "ratings" not in entry and scores:
            row |= {f"{name}_{number}": value for name, value in _attributes(example, answer, scores).items()}
    return [row]


def _helpsteer3(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    (first, _), (second, _) = example.sides
    context = [{"role": "user", "content": example.prompt}]
    preference = -1 if example.first_is_good else 1
    return [{"context": context, "response1": first, "response2": second, "overall_preference": preference}]


def _ultrafeedback(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    completions = []
    for answer, scores in example.sides:
        own = 4 if answer == example.good else 2
        rated = {name: {"Rating": f"{scores.get(name, own):g}"} for name in ULTRAFEEDBACK_ATTRIBUTES}
        overall = float(scores.get("overall", 2 * own))
        completions.append({"response": answer, "overall_score": overall, "annotations": rated})
    return [{"instruction": example.prompt, "completions": completions}]


def _responses(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    names = {*example.good_scores} or {_first(entry.get("objective")) or "score"}
    return [
        {"prompt": example.prompt, "response": answer}
        | {name: scores.get(name, float(answer == example.good)) for name in sorted(names)}
        for answer, scores in example.sides
    ]


def _first(names: Any) -> str | None:
    return names if isinstance(names, str) else next(iter(names or []), None)


def _safe_rlhf(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    row: Row = {"prompt": example.prompt}
    for index, (answer, scores) in enumerate(example.sides):
        row |= {f"response_{index}": answer, f"is_response_{index}_safe": example.number % 3 != index}
        row[f"response_{index}_severity_level"] = int(scores.get("severity_level", 0))
    best = 0 if example.first_is_good else 1
    return [{**row, "better_response_id": best, "safer_response_id": best if example.number % 3 else 1 - best}]


def _hh_rlhf(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    start = f"\n\nHuman: {example.prompt}\n\nAssistant: "
    return [{"chosen": start + example.good, "rejected": start + example.bad}]


def _shp(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    (first, _), (second, _) = example.sides
    ratio = float(entry.get("min_score_ratio") or 1) + 1
    label = int(example.first_is_good)
    return [
        {"history": example.prompt, "human_ref_A": first, "human_ref_B": second, "labels": label, "score_ratio": ratio}
    ]


def _arena(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    talks = [
        [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": answer}]
        for answer, _ in example.sides
    ]
    winner = "model_a" if example.first_is_good else "model_b"
    return [{"conversation_a": talks[0], "conversation_b": talks[1], "winner": winner}]


def _stack_exchange(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    return [{"question": example.prompt, "response_j": example.good, "response_k": example.bad}]


def _summaries(example: Example, entry: Mapping[str, Any]) -> list[Row]:
    texts = [{"text": answer} for answer, _ in example.sides]
    return [{"info": {"post": example.prompt}, "summaries": texts, "choice": 0 if example.first_is_good else 1}]


_MAKERS: dict[str, Callable[[Example, Mapping[str, Any]], list[Row]]] = {
    "pairs": _pairs,
    "amopo": _amopo,
    "helpsteer": _helpsteer,
    "helpsteer2": _helpsteer2,
    "helpsteer3": _helpsteer3,
    "ultrafeedback": _ultrafeedback,
    "responses": _responses,
    "safe_rlhf": _safe_rlhf,
    "hh_rlhf": _hh_rlhf,
    "shp": _shp,
    "arena": _arena,
    "stack_exchange_paired": _stack_exchange,
    "summarize_from_feedback": _summaries,
}


def rows_of_axolotl(entry: Mapping[str, Any], count: int) -> list[Row]:
    """Make up rows with the columns that Axolotl's own types read, for Axolotl's methods.

    Responses are texts, or whole conversations if the type reads those (`..._chat`, `ultra`, `.argilla`).
    """
    kind = str(entry.get("type") or "")
    as_messages = kind.endswith(("_chat", "ultra", ".argilla")) and not kind.startswith("chat_template.default")
    rows = []
    for example in examples({}, count):
        asked = {"role": "user", "content": example.prompt}
        talks = [[asked, {"role": "assistant", "content": answer}] for answer in (example.good, example.bad)]
        is_good = example.first_is_good
        chosen, rejected = talks if as_messages else (example.good, example.bad)
        row: Row = dict.fromkeys(("prompt", "question", "instruction"), example.prompt)
        row |= {"input": example.prompt if kind.endswith(".icr") else "", "system": "", "output": example.good}
        row |= {"text": f"{example.prompt} {example.good}", "messages": talks[0], "label": is_good}
        row["conversations"] = [
            {"from": "human", "value": example.prompt},
            {"from": "gpt", "value": example.good},
        ]
        row |= {"chosen": chosen, "rejected": rejected}
        row |= {"chosen_response": example.good, "rejected_response": example.bad}
        row["completion"] = example.good if is_good else example.bad
        if kind.endswith("argilla_chat"):
            row["completion"] = talks[0 if is_good else 1]
        row |= _named_columns(entry, example, talks[0])
        rows.append(row)
    return rows


def _named_columns(entry: Mapping[str, Any], example: Example, talk: Sequence[Row]) -> Row:
    """The columns that the entry names."""
    kind = entry.get("type")
    fields = {**entry, **(kind if isinstance(kind, Mapping) else {})}
    is_preference = isinstance(kind, str) and kind.startswith("chat_template.")
    texts = {
        "field_prompt": example.prompt,
        "field_instruction": example.prompt,
        "field_system": "",
        "field_input": "",
        "field_output": example.good,
        "field": f"{example.prompt} {example.good}",
        "field_chosen": example.good,
        "field_rejected": example.bad,
        "field_completion": example.good,
        "field_label": example.first_is_good,
        "field_messages": list(talk[:1] if is_preference else talk),
    }
    row = {fields[key]: value for key, value in texts.items() if isinstance(fields.get(key), str)}
    if is_preference and "field_messages" not in fields:
        row["messages"] = list(talk[:1])
    return row
