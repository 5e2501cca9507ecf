"""The rows of a data set -> preference pairs, in one pass and one order, whatever the number of processes."""

import copy
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import combinations, product
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from axolotl_mopo.data.formats import PairFunction, ResponsesFunction
from axolotl_mopo.data.formats.joined import Join
from axolotl_mopo.data.formats.rated import mean
from axolotl_mopo.data.rows import (
    Message,
    PreferencePair,
    RatedResponse,
    Row,
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
"""Pairs with the number of the row that completed them; the numbers ascend."""

_BATCH = 1000


class PairReader:
    """Reads a data set as preference pairs.

    Rated responses of one prompt are compared two by two, whether they share a row or stand apart.

    Args:
        table: the raw data set.
        spec: how its rows are read, and what is needed of them.
        check: refuses prompts, by a RowError, for reasons of the run.

    Raises:
        DataError: where no objective says how rated responses are ordered, or one is given for pairs with a label;
            where `where` names no column, rows of several splits would be mixed, what the rows are joined with cannot
            be loaded, or they are not joined with anything.
    """

    def __init__(
        self,
        table: Dataset,
        spec: DataSpec,
        check: Callable[[list[Message]], None] | None = None,
    ) -> None:
        self.table, self.spec, self.check = table, spec, check
        self.stats = RowStats()
        format, options, where = spec.format, spec.options, spec.where
        labelled = format.is_labelled(table.column_names)
        if labelled and format.read_responses and getattr(options, "objective", None):
            raise DataError(f"{where}: its pairs are ordered by its own `{format.label_column}`; drop the `objective`")
        if not labelled and not spec.objective:
            raise DataError(
                f"{where}: its responses are rated and not ordered; name what orders them with objective: one or "
                f"several of {'its scores' if format.objectives is None else ', '.join(format.objectives)}"
            )
        self._is_labelled = labelled
        self._where = (options.where or {}).items()
        if absent := [name for name, _ in self._where if name not in table.column_names]:
            raise DataError(
                f"{where}: `where` names the column {', '.join(absent)}, which is not there; its columns are "
                f"{', '.join(table.column_names)}"
            )
        if not labelled and getattr(options, "ratings", None):
            raise DataError(f"{where}: its rows are rated themselves, so `ratings` has no effect; remove it")
        self._join: Join | None = None
        if labelled:
            self._check_splits()
            try:
                self._join = format.join and format.join(options)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None

    def pairs(self) -> Numbered:
        """The pairs, counted in `stats`.

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

    def _twin(self) -> "PairReader":
        """A reader of the same rows for a pass before this one, with counts of its own."""
        twin = copy.copy(self)
        twin.stats = RowStats()
        return twin

    def _check_splits(self) -> None:
        column = self.spec.format.split_column
        if column not in self.table.column_names or column in dict(self._where):
            return
        batches = self._batches(self.table.select_columns([column]))
        found = sorted({str(value) for batch in batches for value in batch[column]})
        if len(found) > 1:
            raise DataError(
                f"{self.spec.where}: its rows belong to several splits, {', '.join(found[:9])}, which must not be "
                f"mixed; name the one to read with where: {{{column}: {found[0]}}} (--where {column}={found[0]})"
            )

    def _is_left_out(self, row: Row) -> bool:
        """Whether the entry's own settings leave a row out; counted where they do."""
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
            self.check(pair.prompt)
        return pair

    def _rated(self) -> Numbered:
        group_column = self.spec.format.group_column
        sizes = self._group_sizes(group_column) if group_column else None
        waiting: dict[int, list[tuple[list[Message], list[RatedResponse]]]] = defaultdict(list)
        for number, row, prompt, responses in self._responses():
            key = fingerprint(row.get(group_column)) if group_column else number
            waiting[key].append((prompt, responses))
            if sizes is None or len(waiting[key]) == sizes[key]:
                group = [(prompt, responses) for prompt, responses in waiting.pop(key) if responses]
                if group:
                    yield from self._compare(number, group[0][0], [r for _, responses in group for r in responses])

    def _responses(self) -> Iterator[tuple[int, Row, list[Message], list[RatedResponse]]]:
        """Every row with its prompt and those of its responses that are neither bad nor left out."""
        assert self.spec.format.read_responses  # noqa: S101 (a format has one of both)
        for number, row in self._rows("Reading responses"):
            prompt, responses = self._guard(number, self._read_rated, self.spec.format.read_responses, row) or ([], [])
            yield number, row, prompt, [each for each in responses if self._guard(number, self._accept, each)]

    def _read_rated(self, read: ResponsesFunction, row: Row) -> tuple[list[Message], list[RatedResponse]] | None:
        if self._is_left_out(row):
            return None
        prompt, responses = read(row)
        check_prompt(prompt)
        if self.check:
            self.check(prompt)
        self.stats.empty += not responses
        return prompt, responses

    def _accept(self, response: RatedResponse) -> bool:
        check_response(response, "response")
        self.spec.check_scales(response)
        for name, scale in self._known_scales.items():
            if (value := response.scores.get(name)) is not None:
                rescale(value, scale, scale, name)
        return True

    @cached_property
    def _known_scales(self) -> dict[str, tuple[float, float]]:
        """Where the scores that order responses must lie, as far as the entry or the format says it."""
        own = getattr(self.spec.options, "score_scale", None)
        scales = dict.fromkeys(self.spec.objective, own) if own else self.spec.format.scales
        return {name: scales[name] for name in self.spec.objective if name in scales}

    @cached_property
    def _units(self) -> dict[str, tuple[float, float]]:
        """Where each score of an objective of several has its zero, and how long its unit is, so that they compare.

        Scores of one scale are averaged as they are. Scores of several scales are mapped to 0..1 of their own; where a
        scale is not known, they are standardised over the responses that are read.

        Raises:
            DataError: where a score of unknown scale has one value only.
        """
        names, scales = self.spec.objective, self._known_scales
        if any(name not in scales for name in names):
            return self._standard_units()
        if len({scales[name] for name in names}) == 1:
            return dict.fromkeys(names, (0.0, 1.0))
        return {name: (scales[name][0], scales[name][1] - scales[name][0]) for name in names}

    def _standard_units(self) -> dict[str, tuple[float, float]]:
        values: dict[str, list[float]] = {name: [] for name in self.spec.objective}
        for _, _, _, responses in self._twin()._responses():
            for name, response in product(values, responses):
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
        """What orders a response: its score, or the mean of several in comparable units."""
        if len(self.spec.objective) == 1:
            return response.scores.get(self.spec.objective[0])
        units = {
            name: (value - zero) / unit
            for name, (zero, unit) in self._units.items()
            if (value := response.scores.get(name)) is not None
        }
        value = mean(units, self.spec.objective)
        # So that two sums that differ by rounding alone remain a tie.
        return None if value is None else round(value, 9)

    def _compare(self, number: int, prompt: list[Message], responses: list[RatedResponse]) -> Numbered:
        """Every two responses to a prompt as a pair, the one with the higher mean score chosen."""
        self.stats.alone += len(responses) == 1
        rated = [(self._order(response), response) for response in responses]
        self.stats.unscored += sum(value is None for value, _ in rated)
        scored = [(value, response) for value, response in rated if value is not None]
        for first, second in combinations(scored, 2):
            if first[0] == second[0]:
                self.stats.ties += 1
                continue
            (_, chosen), (_, rejected) = (first, second) if first[0] > second[0] else (second, first)
            if chosen.text.strip() == rejected.text.strip():
                self.stats.identical += 1
                continue
            pair = PreferencePair(prompt, chosen, rejected)
            if self.spec.missing(pair):
                self.stats.incomplete += 1
            else:
                yield number, pair

    def _capped(self, pairs: Numbered, cap: int) -> Numbered:
        """At most `cap` pairs of each prompt, drawn by the seed and the prompt; a second pass counts them first."""
        sizes = Counter(pair.prompt_key for _, pair in self._twin()._read())
        waiting: dict[int, list[PreferencePair]] = defaultdict(list)
        for number, pair in pairs:
            key = pair.prompt_key
            waiting[key].append(pair)
            if len(waiting[key]) < sizes[key]:
                continue
            group = waiting.pop(key)
            draw = random.Random(f"{self.spec.seed} {key}")  # noqa: S311 (no secret)
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
            yield from table.iter(_BATCH)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.spec.where}: a text is not UTF-8 ({error}); convert the data") from None

    def _rows(self, title: str) -> Iterator[tuple[int, Row]]:
        """The rows and their numbers, counted."""
        with tqdm(total=len(self.table), desc=title, unit=" rows") as progress:
            for batch in self._batches(self.table):
                for values in zip(*batch.values(), strict=True):
                    self.stats.rows += 1
                    yield self.stats.rows - 1, dict(zip(batch, values, strict=True))
                progress.update(self.stats.rows - progress.n)

    def _guard(self, number: int, function: Callable[..., T | None], *args: Any) -> T | None:
        """Call `function`; a bad row is told with data set and number, or counted and left out."""
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
    """Whether a column holds what `where` asks for; either may be the text of the other, and 1 is not true.

    Raises:
        RowError: where a text is compared with a number whose own text is lost, as 1.10 is 1.1.
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
