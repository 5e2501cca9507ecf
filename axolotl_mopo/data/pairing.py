"""The rows of a data set -> preference pairs, in one pass and one order, whatever the number of processes."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, TypeVar

from datasets import Dataset
from tqdm.auto import tqdm

from axolotl_mopo.data.formats import Format, PairFunction, ResponsesFunction
from axolotl_mopo.data.formats.rated import mean
from axolotl_mopo.data.reading import Reading
from axolotl_mopo.data.rows import (
    DataError,
    Message,
    PreferencePair,
    RatedResponse,
    Row,
    RowError,
    check_pair,
    check_prompt,
    check_response,
    fingerprint,
)
from axolotl_mopo.data.tally import Tally

T = TypeVar("T")
Numbered = Iterator[tuple[int, PreferencePair]]
"""Pairs with the number of the row that completed them; the numbers ascend."""

_BATCH = 1000


class PairReader:
    """Reads a data set as preference pairs.

    Rated responses of one prompt are compared two by two, whether they share a row or stand apart.

    Args:
        table: the raw data set.
        format: how its rows are laid out.
        reading: what is needed of them.
        where: the data set's name in messages.
        check: refuses prompts, by a RowError, for reasons of the run.

    Raises:
        DataError: where no objective says how rated responses are ordered, or one is given for pairs with a label.
    """

    def __init__(
        self,
        table: Dataset,
        format: Format,
        reading: Reading,
        where: str,
        check: Callable[[list[Message]], None] | None = None,
    ) -> None:
        self.table, self.format, self.reading, self.where, self.check = table, format, reading, where, check
        self.tally = Tally()
        labelled = format.is_labelled(table.column_names)
        if labelled and format.read_responses and getattr(reading.options, "objective", None):
            raise DataError(f"{where}: its pairs are ordered by its own `{format.label_column}`; drop the `objective`")
        if not labelled and not reading.objective:
            raise DataError(
                f"{where}: its responses are rated and not ordered; name what orders them with objective: one or "
                f"several of {'its scores' if format.objectives is None else ', '.join(format.objectives)}"
            )
        self._read = self._labelled if labelled else self._rated

    def pairs(self) -> Numbered:
        """The pairs, counted in `tally`.

        Raises:
            DataError: for a bad row, with its number, unless `on_bad_row` is `drop`.
        """
        cap = self.reading.options.max_pairs_per_prompt
        pairs = self._read()
        for row, pair in pairs if cap is None else self._capped(pairs, cap):
            self.tally.add(pair)
            yield row, pair

    def _labelled(self) -> Numbered:
        assert self.format.read_pair  # noqa: S101 (a format has one of both)
        for number, row in self._rows("Reading pairs"):
            pair = self._guard(number, self._read_labelled, self.format.read_pair, row)
            if pair is not None:
                yield number, pair

    def _read_labelled(self, read_pair: PairFunction, row: Row) -> PreferencePair | None:
        pair = read_pair(row, self.reading)
        if pair is None:
            self.tally.ties += 1
            return None
        check_pair(pair)
        self.reading.check_scores(pair)
        if self.check:
            self.check(pair.prompt)
        return pair

    def _rated(self) -> Numbered:
        assert self.format.read_responses  # noqa: S101
        group_column = self.format.group_column
        sizes = self._group_sizes(group_column) if group_column else None
        waiting: dict[int, list[tuple[list[Message], list[RatedResponse]]]] = defaultdict(list)
        for number, row in self._rows("Reading responses"):
            prompt, responses = self._guard(number, self._read_rated, self.format.read_responses, row) or ([], [])
            responses = [response for response in responses if self._guard(number, self._accept, response)]
            key = fingerprint(row.get(group_column)) if group_column else number
            waiting[key].append((prompt, responses))
            if sizes is None or len(waiting[key]) == sizes[key]:
                group = [(prompt, responses) for prompt, responses in waiting.pop(key) if responses]
                if group:
                    yield from self._compare(number, group[0][0], [r for _, responses in group for r in responses])

    def _read_rated(self, read: ResponsesFunction, row: Row) -> tuple[list[Message], list[RatedResponse]]:
        prompt, responses = read(row)
        check_prompt(prompt)
        if self.check:
            self.check(prompt)
        self.tally.empty += not responses
        return prompt, responses

    def _accept(self, response: RatedResponse) -> bool:
        check_response(response, "response")
        self.reading.check_scales(response)
        return True

    def _compare(self, number: int, prompt: list[Message], responses: list[RatedResponse]) -> Numbered:
        """Every two responses to a prompt as a pair, the one with the higher mean score chosen."""
        self.tally.alone += len(responses) == 1
        rated = [(mean(response.scores, self.reading.objective), response) for response in responses]
        self.tally.unscored += sum(value is None for value, _ in rated)
        scored = [(value, response) for value, response in rated if value is not None]
        for first, second in combinations(scored, 2):
            if first[0] == second[0]:
                self.tally.ties += 1
                continue
            (_, chosen), (_, rejected) = (first, second) if first[0] > second[0] else (second, first)
            if chosen.text.strip() == rejected.text.strip():
                self.tally.identical += 1
                continue
            pair = PreferencePair(prompt, chosen, rejected)
            if self.reading.missing(pair):
                self.tally.incomplete += 1
            else:
                yield number, pair

    def _capped(self, pairs: Numbered, cap: int) -> Numbered:
        """At most `cap` pairs of each prompt, drawn by the seed and the prompt; a second pass counts them first."""
        counter = PairReader(self.table, self.format, self.reading, self.where, self.check)
        sizes = Counter(pair.prompt_key for _, pair in counter._read())
        waiting: dict[int, list[PreferencePair]] = defaultdict(list)
        for number, pair in pairs:
            key = pair.prompt_key
            waiting[key].append(pair)
            if len(waiting[key]) < sizes[key]:
                continue
            group = waiting.pop(key)
            draw = random.Random(f"{self.reading.seed} {key}")  # noqa: S311 (no secret)
            kept = sorted(draw.sample(range(len(group)), min(cap, len(group))))
            self.tally.capped += len(group) - len(kept)
            yield from ((number, group[index]) for index in kept)

    def _group_sizes(self, group_column: str) -> Counter[int]:
        if group_column not in self.table.column_names:
            raise DataError(
                f"{self.where}: it has no column `{group_column}`; its columns are {', '.join(self.table.column_names)}"
            )
        batches = self._batches(self.table.select_columns([group_column]))
        return Counter(fingerprint(prompt) for batch in batches for prompt in batch[group_column])

    def _batches(self, table: Dataset) -> Iterator[Any]:
        try:
            yield from table.iter(_BATCH)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where}: a text is not UTF-8 ({error}); convert the data") from None

    def _rows(self, title: str) -> Iterator[tuple[int, Row]]:
        """The rows and their numbers, counted."""
        with tqdm(total=len(self.table), desc=title, unit=" rows") as progress:
            for batch in self._batches(self.table):
                for values in zip(*batch.values(), strict=True):
                    self.tally.rows += 1
                    yield self.tally.rows - 1, dict(zip(batch, values, strict=True))
                progress.update(self.tally.rows - progress.n)

    def _guard(self, number: int, function: Callable[..., T], *args: Any) -> T | None:
        """Call `function`; a bad row is told with data set and number, or counted and left out."""
        try:
            return function(*args)
        except RowError as error:
            if self.reading.options.on_bad_row == "raise":
                raise DataError(
                    f"{self.where}, row {number}: {error}; mend the row, or leave such rows out with on_bad_row: drop"
                ) from None
            self.tally.bad[error.kind] += 1
            return None
