"""Read the rows of a data set as preference pairs, in one pass and in an order that no number of processes changes."""

import copy
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import combinations, product
from typing import Any, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from axolotl_mopo.data.conversations import template_inputs
from axolotl_mopo.data.formats import PairFunction, ResponsesFunction
from axolotl_mopo.data.formats.joined import Join
from axolotl_mopo.data.formats.rated import mean
from axolotl_mopo.data.media import check_texts_only, media_columns, stored_batches
from axolotl_mopo.data.rows import (
    NO_INPUTS,
    Message,
    PreferencePair,
    RatedResponse,
    Row,
    TemplateInputs,
    check_pair,
    check_prompt,
    check_response,
    rescale,
)
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.stats import RowStats
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import DataError, RowError

T = TypeVar("T")
Numbered = Iterator[tuple[int, PreferencePair]]
"""Pairs with the number of the row that completed them, in ascending order."""

Check = Callable[[list[Message], Sequence[RatedResponse], TemplateInputs], None]
"""Raises a RowError for a prompt with responses that the chat template cannot render."""

_BATCH = 1000


class _Asked(NamedTuple):
    """A prompt, what the chat template reads besides its messages, and rated responses."""

    prompt: list[Message]
    responses: list[RatedResponse]
    inputs: TemplateInputs = NO_INPUTS


class PairReader:
    """Reads a data set as preference pairs.

    Rated responses to one prompt are compared two by two, whether they are in one row or in several.

    Args:
        table: the raw data set.
        spec: how its rows are read, and which scores they must have.
        check: raises a RowError for a row that the run cannot use.

    Raises:
        DataError: if rated responses have no objective to order them, or pairs with a label have one; if `where`
            names an unknown column; if rows of several splits would be mixed; or if `ratings` cannot be loaded or has
            no effect.
    """

    def __init__(
        self,
        table: Dataset,
        spec: DataSpec,
        check: Check | None = None,
    ) -> None:
        self.table, self.spec, self.check = table, spec, check
        self.stats = RowStats()
        format, options, where = spec.format, spec.options, spec.where
        labelled = format.is_labelled(table.column_names)
        if labelled and format.read_responses and getattr(options, "objective", None):
            raise DataError(f"{where}: its pairs are ordered by its own `{format.label_column}`; remove `objective`")
        if not labelled and not spec.objective:
            raise DataError(
                f"{where}: its responses are rated but not ordered; set `objective` to one or several of "
                f"{'its scores' if format.objectives is None else ', '.join(format.objectives)}"
            )
        self._is_labelled = labelled
        self._media = media_columns(table.features)
        self._where = (options.where or {}).items()
        if absent := [name for name, _ in self._where if name not in table.column_names]:
            raise DataError(
                f"{where}: `where` names the column {', '.join(absent)}, which does not exist; its columns are "
                f"{', '.join(table.column_names)}"
            )
        if not labelled and getattr(options, "ratings", None):
            raise DataError(f"{where}: its rows have ratings already, so `ratings` has no effect; remove it")
        self._join: Join | None = None
        if labelled:
            self._check_splits()
            try:
                self._join = format.join and format.join(options)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None

    def pairs(self) -> Numbered:
        """Yield the pairs and count them in `stats`.

        Raises:
            DataError: for a bad row, with its number, unless `on_bad_row` is `drop`.
        """
        cap = self.spec.options.max_pairs_per_prompt
        pairs = self._read()
        for row, pair in pairs if cap is None else self._capped(pairs, cap):
            self.stats.add(pair)
            yield row, pair

    def _read(self) -> Numbered:
        return self._labelled() if self._is_labelled else self._rated()

    def _first_pass(self) -> "PairReader":
        """Return a reader for an additional pass over the same rows, with separate counts."""
        reader = copy.copy(self)
        reader.stats = RowStats()
        return reader

    def _check_splits(self) -> None:
        column = self.spec.format.split_column
        if column not in self.table.column_names or column in dict(self._where):
            return
        batches = self._batches(self.table.select_columns([column]))
        found = sorted({str(value) for batch in batches for value in batch[column]})
        if len(found) > 1:
            raise DataError(
                f"{self.spec.where}: its rows belong to several splits, {', '.join(found[:9])}, which must not be "
                f"mixed; select one with where: {{{column}: {found[0]}}} (--where {column}={found[0]})"
            )

    def _is_left_out(self, row: Row) -> bool:
        """Whether the entry's own settings leave a row out; if so, count it."""
        what = next(
            (f"rows whose `{name}` is not {wanted!r}" for name, wanted in self._where if not _is(row[name], wanted)),
            None,
        )
        if what is None and self.spec.format.left_out:
            what = self.spec.format.left_out(row, self.spec.options)
        if what is not None:
            self.stats.left_out[what] += 1
        return what is not None

    def _labelled(self) -> Numbered:
        assert self.spec.format.read_pair  # noqa: S101 (a format has one of both)
        for number, row in self._rows("Reading pairs"):
            pair = self._guard(number, self._read_labelled, self.spec.format.read_pair, row)
            if pair is not None:
                yield number, pair

    def _read_labelled(self, read_pair: PairFunction, row: Row) -> PreferencePair | None:
        if self._is_left_out(row):
            return None
        check_texts_only(row, self._media)
        pair = read_pair(row, self.spec.options)
        if pair is None:
            self.stats.ties += 1
            return None
        if self._join:
            pair = self._join(row, pair)
        check_pair(pair)
        unrated = not (pair.chosen.scores and pair.rejected.scores)
        if self._join and (unrated or self.spec.missing(pair)):
            self.stats.incomplete += 1
            return None
        self.spec.check_scores(pair)
        if self.check:
            self.check(pair.prompt, (pair.chosen, pair.rejected), pair.inputs)
        return pair

    def _rated(self) -> Numbered:
        group_column = self.spec.format.group_column
        sizes = self._group_sizes(group_column) if group_column else None
        waiting: dict[int, list[_Asked]] = defaultdict(list)
        for number, row, asked in self._responses():
            key = fingerprint(row.get(group_column)) if group_column else number
            waiting[key].append(asked)
            if sizes is None or len(waiting[key]) == sizes[key]:
                group = [asked for asked in waiting.pop(key) if asked.responses]
                if any(asked.inputs != group[0].inputs for asked in group):
                    raise DataError(
                        f"{self.spec.where}, row {number}: its prompt is that of other rows whose `tools` or "
                        "`chat_template_kwargs` differ; the responses to one prompt must have the same"
                    )
                if group:
                    yield from self._compare(number, group[0], [each for asked in group for each in asked.responses])

    def _responses(self) -> Iterator[tuple[int, Row, _Asked]]:
        """Yield every row with its prompt and its responses, without those that are bad or left out."""
        assert self.spec.format.read_responses  # noqa: S101 (a format has one of both)
        for number, row in self._rows("Reading responses"):
            asked = self._guard(number, self._read_rated, self.spec.format.read_responses, row) or _Asked([], [])
            accepted = [each for each in asked.responses if self._guard(number, self._accept, each)]
            yield number, row, asked._replace(responses=accepted)

    def _read_rated(self, read: ResponsesFunction, row: Row) -> _Asked | None:
        if self._is_left_out(row):
            return None
        check_texts_only(row, self._media)
        prompt, responses = read(row)
        asked = _Asked(prompt, responses, template_inputs(row))
        check_prompt(prompt)
        if self.check:
            self.check(*asked)
        self.stats.empty += not responses
        return asked

    def _accept(self, response: RatedResponse) -> bool:
        check_response(response, "response")
        self.spec.check_scales(response)
        for name, scale in self._known_scales.items():
            if (value := response.scores.get(name)) is not None:
                rescale(value, scale, scale, name)
        return True

    @cached_property
    def _known_scales(self) -> dict[str, tuple[float, float]]:
        """Scales of the scores that order responses, for those that the entry or the format defines."""
        own = getattr(self.spec.options, "score_scale", None)
        scales = dict.fromkeys(self.spec.objective, own) if own else self.spec.format.scales
        return {name: scales[name] for name in self.spec.objective if name in scales}

    @cached_property
    def _units(self) -> dict[str, tuple[float, float]]:
        """Zero and unit of each score of an objective, which make several scores comparable.

        Scores with the same scale are averaged as they are. Scores with different scales are mapped to 0..1 first. If
        a scale is unknown, all are standardised over the responses that are read.

        Raises:
            DataError: if all scores are standardised and one of them has a single value.
        """
        names, scales = self.spec.objective, self._known_scales
        if any(name not in scales for name in names):
            return self._standard_units()
        if len({scales[name] for name in names}) == 1:
            return dict.fromkeys(names, (0.0, 1.0))
        return {name: (scales[name][0], scales[name][1] - scales[name][0]) for name in names}

    def _standard_units(self) -> dict[str, tuple[float, float]]:
        values: dict[str, list[float]] = {name: [] for name in self.spec.objective}
        for _, _, asked in self._first_pass()._responses():
            for name, response in product(values, asked.responses):
                if (value := response.scores.get(name)) is not None:
                    values[name].append(value)
        return {name: self._standard_unit(name, np.array(found)) for name, found in values.items() if found}

    def _standard_unit(self, name: str, values: NDArray[np.float64]) -> tuple[float, float]:
        with np.errstate(over="ignore", invalid="ignore"):
            zero, unit = float(values.mean()), float(values.std())
        if values.min() == values.max() or not 0 < unit < np.inf:
            raise DataError(
                f"{self.spec.where}: the score {name} lies between {values.min():g} and {values.max():g} for all "
                "responses, so it cannot be averaged with others in units of its standard deviation; "
                "remove it from the objective"
            )
        return zero, unit

    def _order(self, response: RatedResponse) -> float | None:
        """Return what orders a response: its score, or the mean of several scores in comparable units."""
        if len(self.spec.objective) == 1:
            return response.scores.get(self.spec.objective[0])
        units = {
            name: (value - zero) / unit
            for name, (zero, unit) in self._units.items()
            if (value := response.scores.get(name)) is not None
        }
        value = mean(units, self.spec.objective)
        # Two sums that differ only by rounding errors must remain a tie.
        return None if value is None else round(value, 9)

    def _compare(self, number: int, asked: _Asked, responses: list[RatedResponse]) -> Numbered:
        """Pair every two responses to a prompt; the one with the higher score is chosen."""
        self.stats.alone += len(responses) == 1
        rated = [(self._order(response), response) for response in responses]
        self.stats.unscored += sum(value is None for value, _ in rated)
        scored = [(value, response) for value, response in rated if value is not None]
        for first, second in combinations(scored, 2):
            if first[0] == second[0]:
                self.stats.ties += 1
                continue
            (_, chosen), (_, rejected) = (first, second) if first[0] > second[0] else (second, first)
            if not chosen.differs_from(rejected):
                self.stats.identical += 1
                continue
            pair = PreferencePair(asked.prompt, chosen, rejected, asked.inputs)
            if self.spec.missing(pair):
                self.stats.incomplete += 1
            else:
                yield number, pair

    def _capped(self, pairs: Numbered, cap: int) -> Numbered:
        """Sample at most `cap` pairs per prompt, by the seed and the prompt; a separate pass counts them first."""
        sizes = Counter(pair.prompt_key for _, pair in self._first_pass()._read())
        waiting: dict[int, list[PreferencePair]] = defaultdict(list)
        for number, pair in pairs:
            key = pair.prompt_key
            waiting[key].append(pair)
            if len(waiting[key]) < sizes[key]:
                continue
            group = waiting.pop(key)
            draw = random.Random(f"{self.spec.seed} {key}")  # noqa: S311 (not for secrets)
            kept = sorted(draw.sample(range(len(group)), min(cap, len(group))))
            self.stats.capped += len(group) - len(kept)
            yield from ((number, group[index]) for index in kept)

    def _group_sizes(self, group_column: str) -> Counter[int]:
        if group_column not in self.table.column_names:
            raise DataError(
                f"{self.spec.where}: it has no column `{group_column}`; its columns are "
                f"{', '.join(self.table.column_names)}"
            )
        batches = self._batches(self.table.select_columns([group_column]))
        return Counter(fingerprint(prompt) for batch in batches for prompt in batch[group_column])

    def _batches(self, table: Dataset) -> Iterator[Any]:
        try:
            yield from stored_batches(table, _BATCH)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.spec.where}: a text is not UTF-8 ({error}); convert the data to UTF-8") from None

    def _rows(self, title: str) -> Iterator[tuple[int, Row]]:
        """Yield the rows with their numbers, and count them."""
        with tqdm(total=len(self.table), desc=title, unit=" rows") as progress:
            for batch in self._batches(self.table):
                for values in zip(*batch.values(), strict=True):
                    self.stats.rows += 1
                    yield self.stats.rows - 1, dict(zip(batch, values, strict=True))
                progress.update(self.stats.rows - progress.n)

    def _guard(self, number: int, function: Callable[..., T | None], *args: Any) -> T | None:
        """Call `function`; a bad row is reported with its data set and number, or counted and left out."""
        try:
            return function(*args)
        except RowError as error:
            if self.spec.options.on_bad_row == "raise":
                raise DataError(
                    f"{self.spec.where}, row {number}: {error}; fix the row, or leave such rows out with "
                    "on_bad_row: drop"
                ) from None
            self.stats.bad[error.kind] += 1
            return None


def _is(value: Any, wanted: Any) -> bool:
    """Whether a column has the value that `where` asks for.

    A text equals the number or boolean that it spells; 1 does not equal true.

    Raises:
        RowError: if a text is compared with a float, since YAML does not keep its spelling (1.10 becomes 1.1).
    """
    if isinstance(value, str) and isinstance(wanted, float):
        raise RowError(
            f"`where` compares a text with the number {wanted:g}; put the value in quotes", "unclear `where`"
        )
    if isinstance(value, str):
        return value == wanted if isinstance(wanted, str) else value.lower() == str(wanted).lower()
    if isinstance(wanted, str):
        try:
            wanted = json.loads(wanted)
        except ValueError:
            return False
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)
