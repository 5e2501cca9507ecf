"""Detect the format of a table: the `type:` of its data-set entry and the entry's other keys."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from datasets import Dataset

from axolotl_mopo.data.formats import FORMATS, Format
from axolotl_mopo.data.formats.rated import HELPSTEER_ATTRIBUTES, RESPONSE_COLUMNS
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rows import PreferencePair, Row, score
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.stats import RowStats
from axolotl_mopo.errors import DataError

COLUMNS: dict[str, tuple[str, ...]] = {
    "ultrafeedback": ("instruction", "completions"),
    "safe_rlhf": ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
    "helpsteer2": ("prompt", "response_1", "response_2", "preference_strength"),
    "helpsteer": ("prompt", "response", *HELPSTEER_ATTRIBUTES),
    "helpsteer3": ("context", "response1", "response2", "overall_preference"),
    "shp": ("history", "human_ref_A", "human_ref_B", "labels"),
    "arena": ("conversation_a", "conversation_b", "winner"),
    "stack_exchange_paired": ("question", "response_j", "response_k"),
    "summarize_from_feedback": ("info", "summaries", "choice"),
    "amopo": ("prompt", "chosen", "rejected"),
    "hh_rlhf": ("chosen", "rejected"),
    "responses": ("prompt", "response"),
    "pairs": ("chosen", "rejected"),
}
"""The columns by which a format is recognized, the most specific format first."""
NOTES = {
    "amopo": "mappings of a `response` and its scores",
    "hh_rlhf": "dialogues as strings with Human: and Assistant:",
    "responses": "one response per row, and columns of numbers with its scores",
    "pairs": "texts or messages; a prompt, or messages that begin with it; optional scores",
}
"""Contents of a format's columns, if the names are not enough."""

ROWS = 2000
"""Number of rows to try."""
MOST_BAD = 0.1
"""Maximum fraction of bad rows, which `on_bad_row: drop` leaves out."""

_SIDES = (
    ("chosen", "rejected"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("winner", "loser"),
    ("win", "lose"),
    ("better", "worse"),
    ("good", "bad"),
    ("positive", "negative"),
)
"""Words in the names of the preferred response's column and of the other one's."""
_PROMPTS = ("input", "query", "conversations", "conversation", "context", "post", "text", "user")
"""Names of prompt columns to try if there is none that `pairs` reads by default."""
_PROMPTS_OF_PAIRS = ("prompt", "messages", "question", "instruction")
_SYSTEMS = ("system_prompt", "system_message")
_RESPONSES = ("", "response", "answer", "completion", "text", "output", "message", "content", "conversation", "reply")
"""The rest of the name of a response's column, without such a word."""
_OVERALL = ("overall", "score", "rating", "reward", "helpfulness")
"""Scores that order responses, the preferred ones first."""
_NO_SCORES = ("id", "index", "idx", "row", "turn", "turns", "seed", "timestamp", "length", "num_tokens", "tokens")
"""Columns of numbers that are not scores."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Usual:
    """The usual objectives for a known data set."""

    objective: str
    """The score or label that orders the pairs."""
    margins: tuple[str, ...]
    dimensions: tuple[str, ...]


USUAL = {
    "helpsteer": Usual("helpfulness", ("verbosity",), ("helpfulness", "correctness", "coherence")),
    "helpsteer2": Usual("helpfulness", ("verbosity",), ("helpfulness", "correctness", "coherence")),
    "ultrafeedback": Usual(
        "helpfulness", ("honesty",), ("instruction_following", "honesty", "truthfulness", "helpfulness")
    ),
    "safe_rlhf": Usual("better", ("safer",), ("safer", "safe")),
}


@dataclass(frozen=True)
class Recognized:
    """The format of a table, and the pairs of its first rows."""

    kind: str
    """The format's name, `type: axolotl_mopo.<kind>` in an entry."""
    options: Options
    """Other keys of the entry."""
    objective: tuple[str, ...]
    """The score that orders the pairs; empty if a label does."""
    pairs: list[PreferencePair]
    stats: RowStats

    @property
    def format(self) -> Format:
        """The format of the rows."""
        return FORMATS[self.kind]

    @property
    def is_rated(self) -> bool:
        """Whether a score orders the pairs, not a label."""
        return bool(self.objective) and self.format.read_responses is not None


def recognize(
    table: Dataset, kind: str | None = None, options: Options | None = None, objective: str | None = None
) -> Recognized:
    """Find the format and the keys that read a table's first rows, from its columns and by trying.

    Args:
        table: the raw rows.
        kind: the only format to try; by default all formats whose columns the table has.
        options: keys of the entry that the user chose.
        objective: score that orders the pairs, if no label does.

    Raises:
        DataError: if no format reads the rows; lists the columns, the attempts and the formats.
    """
    rows = table.select(range(min(len(table), ROWS)))
    if not len(rows):
        raise DataError("it has no rows; use another file or split")
    reasons = []
    for name, keys in _candidates(rows, kind, options or {}):
        try:
            found = _try(rows, name, keys, objective)
        except DataError as error:
            reasons.append(f"  {name}{_shown(keys)}: {error}")
            continue
        return _with_scores(rows, found) if name == "pairs" and "field_chosen_scores" not in keys else found
    raise DataError(_refusal(table, reasons, kind))


def score_names(recognized: Recognized) -> list[str]:
    """The scores that both responses of every pair have. If a score orders the pairs, a tenth may lack others."""
    allowed = MOST_BAD * len(recognized.pairs) if recognized.is_rated else 0
    names = dict.fromkeys(chain.from_iterable(pair.chosen.scores for pair in recognized.pairs))
    return [name for name in names if _lacking(recognized.pairs, name) <= allowed and not _rates_nothing(name)]


def _lacking(pairs: Sequence[PreferencePair], name: str) -> int:
    sides = ((pair.chosen.scores.get(name), pair.rejected.scores.get(name)) for pair in pairs)
    return sum(None in values for values in sides)


def _rates_nothing(name: str) -> bool:
    return name.lower() in _NO_SCORES or name.lower().endswith(("_id", "_index"))


def _candidates(rows: Dataset, kind: str | None, options: Options) -> Iterator[tuple[str, Options]]:
    """The formats and keys to try, in order."""
    columns = set(rows.column_names)
    for name, needed in COLUMNS.items():
        if kind not in (None, name) or not set(options) <= set(FORMATS[name].options.model_fields):
            continue
        if name == "pairs":
            for keys in _pairs_keys(rows, options):
                yield name, keys
        elif kind or columns.issuperset(needed):
            yield name, options | _of_one_split(rows, FORMATS[name])


def _of_one_split(rows: Dataset, format: Format) -> Options:
    """The key that selects the training rows of a table with a column of splits."""
    column = format.split_column
    if column not in rows.column_names or not format.is_labelled(rows.column_names):
        return {}
    return {"where": {column: "train"}} if "train" in rows[column] else {}


def _pairs_keys(rows: Dataset, given: Options) -> Iterator[Options]:
    """Keys with which `pairs` may find the responses, the prompt and the system message.

    A column is proposed only if it is the only candidate. If several columns may be the prompt, the user has to choose.
    """
    texts = [name for name, value in rows[0].items() if isinstance(value, str | list | Mapping)]
    sides: list[Options] = [{}]
    if not {"chosen", "rejected"} <= set(texts) and not {"field_chosen", "field_rejected"} & set(given):
        sides = [{"field_chosen": one, "field_rejected": other} for one, other in _opposites(texts)]
    prompts = [name for name in _PROMPTS if name in texts]
    systems = [name for name in _SYSTEMS if name in texts]
    others: list[Options] = [{}]
    if len(prompts) == 1 and not set(_PROMPTS_OF_PAIRS) & set(texts):
        others.append({"field_prompt": prompts[0]})
    if len(systems) == 1:
        others += [{**keys, "field_system": systems[0]} for keys in others]
    for side, keys in product(sides, others):
        yield {**side, **keys, **given}


def _opposites(columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of columns whose names differ only by a word for the better response and one for the worse."""
    for better, worse in _SIDES:
        for column in columns:
            rest = column.lower().replace(better, "", 1).strip("_- ")
            other = column.replace(better, worse)
            if better in column and other in columns and (rest.removesuffix("s") in _RESPONSES):
                yield column, other


def _try(rows: Dataset, kind: str, keys: Options, objective: str | None) -> Recognized:
    """Read the rows as one format. A few bad rows are left out.

    Raises:
        DataError: if the format does not read the rows.
    """
    format = FORMATS[kind]
    order = _objective(rows, kind, objective)
    if fault := format.objective_fault(order):
        raise DataError(fault)
    pairs, stats = _read(rows, kind, {**keys, "on_bad_row": "drop"}, order)
    given = "on_bad_row" in keys
    if stats.bad and not given:
        parts = stats.bad.total() + stats.pairs + stats.ties if format.read_pair else stats.rows
        if not pairs or stats.bad.total() > MOST_BAD * parts:
            _read(rows, kind, keys, order)  # raises an error that names the row
        keys = {**keys, "on_bad_row": "drop"}
    if not pairs:
        raise DataError(f"the first {len(rows):,} rows give no pairs: {'; '.join(stats.lines())}")
    return Recognized(kind, keys, order, pairs, stats)


def _objective(rows: Dataset, kind: str, objective: str | None) -> tuple[str, ...]:
    """The score that orders the pairs: the user's choice, the format's usual one, or the first column of scores."""
    format = FORMATS[kind]
    if format.objectives == () or (format.read_responses and format.is_labelled(rows.column_names)):
        return ()
    if objective:
        return (objective,)
    if kind in USUAL:
        return (USUAL[kind].objective,)
    names = [
        name
        for name in rows.column_names
        if name not in RESPONSE_COLUMNS and not _rates_nothing(name) and _are_scores(rows[name])
    ]
    if not names:
        raise DataError("it has no column of scores to order the responses by")
    return (next((name for name in _OVERALL if name in names), names[0]),)


def _are_scores(values: Sequence[Any]) -> bool:
    """Whether most values are numbers and at least two differ."""
    found = [score(value) for value in values if not isinstance(value, str)]
    numbers = [number for number in found if number is not None]
    return len(numbers) > len(values) / 2 and len(set(numbers)) > 1


def _read(rows: Dataset, kind: str, keys: Options, objective: tuple[str, ...]) -> tuple[list[PreferencePair], RowStats]:
    """The pairs of the rows, without a progress bar."""
    options = FORMATS[kind].options.model_validate(keys)
    spec = DataSpec(where="the data", strategy=kind, options=options, objective=objective)
    with contextlib.redirect_stderr(io.StringIO()):
        reader = PairReader(rows, spec)
        return [pair for _, pair in reader.pairs()], reader.stats


def _with_scores(rows: Dataset, found: Recognized) -> Recognized:
    """Search for columns of scores under other names, if `pairs` finds none."""
    if score_names(found):
        return found
    chosen = found.options.get("field_chosen", "chosen")
    rejected = found.options.get("field_rejected", "rejected")
    for one, other in [*_SIDES, (chosen, rejected)]:
        for field, other_field in _score_fields(rows, one, other):
            keys = {**found.options, "field_chosen_scores": field, "field_rejected_scores": other_field}
            try:
                scored = _try(rows, "pairs", keys, None)
            except DataError:
                continue
            if score_names(scored):
                return scored
    return found


def _score_fields(rows: Dataset, one: str, other: str) -> Iterator[tuple[str, str]]:
    """Columns of nested scores, or patterns of flat ones, whose names differ only by the two words."""
    columns = rows.column_names
    for column in columns:
        if one not in column or (match := column.replace(one, other)) not in columns or match == column:
            continue
        if isinstance(rows[0][column], Mapping):
            yield column, match
        elif _are_scores(rows[column]) or _are_scores(rows[match]):
            head, tail = (part.strip("_") for part in column.split(one, 1))
            if head and not tail:
                yield column.replace(head, "{}", 1), match.replace(head, "{}", 1)
            elif tail and not head:
                yield column.replace(tail, "{}", 1), match.replace(tail, "{}", 1)


def _refusal(table: Dataset, reasons: Sequence[str], kind: str | None) -> str:
    lines = [f"its rows cannot be read as preference data. Its columns are {', '.join(table.column_names)}."]
    if reasons:
        lines += ["Tried:", *reasons]
    if kind is None:
        lines.append("Formats, and the columns that identify them:")
        lines += [
            f"  {name}: {', '.join(columns)}" + (f" ({NOTES[name]})" if name in NOTES else "")
            for name, columns in COLUMNS.items()
        ]
        lines.append(
            "Rename the columns, or name them with --field-prompt, --field-chosen and --field-rejected. Each prompt "
            "needs two responses, one of which is preferred, or responses with scores."
        )
    return "\n".join(lines)


def _shown(keys: Row) -> str:
    named = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return f" ({named})" if named else ""
