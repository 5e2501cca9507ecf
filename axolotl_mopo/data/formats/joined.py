"""Join HelpSteer2's ratings with its preference part, whose rows have none."""

from collections.abc import Callable
from dataclasses import replace

from axolotl_mopo.data.formats.rated import HELPSTEER_ATTRIBUTES, helpsteer_scores
from axolotl_mopo.data.options import HelpSteer2Options
from axolotl_mopo.data.rows import PreferencePair, Row
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import DataError, RowError

Join = Callable[[Row, PreferencePair], PreferencePair]
"""Takes a row and the pair read from it; returns the pair with the joined scores."""

RATED_COLUMNS = frozenset(f"{name}_{number}" for name in HELPSTEER_ATTRIBUTES for number in (1, 2))
"""Columns for ratings within a row of the preference part."""

_COLUMNS = ("prompt", "response")


def join_ratings(options: HelpSteer2Options) -> Join | None:
    """Return a function that adds the ratings of the entry to pairs; None if the entry has no `ratings`.

    A response without a rating gets no scores. The function raises a RowError if a row has ratings already.

    Raises:
        DataError: if the ratings cannot be loaded.
    """
    if options.ratings is None:
        return None
    ratings = _load_ratings(options.ratings, options.ratings_split or "train")

    def join(row: Row, pair: PreferencePair) -> PreferencePair:
        if own := [name for name in row if name in RATED_COLUMNS]:
            raise RowError(f"it has ratings already, in `{own[0]}`; remove `ratings` from the entry")
        chosen, rejected = (
            replace(side, scores=ratings.get(_rating_key(row["prompt"], side.text), {}))
            for side in (pair.chosen, pair.rejected)
        )
        return replace(pair, chosen=chosen, rejected=rejected)

    return join


def _load_ratings(source: str, split: str) -> dict[int, dict[str, float]]:
    """Load the scores of responses by `_rating_key`.

    A response with two different ratings gets no scores, since it is unknown which are right.

    Raises:
        DataError: if the ratings cannot be loaded, or are not rated responses.
    """
    from axolotl_mopo.data.tables import load_table  # deferred: importing `datasets` takes a second

    table = load_table(source, split=split)
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise DataError(
            f"`ratings`, {source}, has no column {', '.join(missing)}; its columns are "
            f"{', '.join(table.column_names)}; set it to HelpSteer2's rated responses"
        )
    ratings: dict[int, dict[str, float]] = {}
    for row in table:
        scores = {name: value for name, value in helpsteer_scores(row).items() if value is not None}
        key = _rating_key(row["prompt"], row["response"])
        ratings[key] = scores if ratings.setdefault(key, scores) == scores else {}
    return ratings


def _rating_key(prompt: object, response: object) -> int:
    """Return a key of a prompt and a response; whitespace around the texts is ignored."""
    return fingerprint([str(prompt).strip(), str(response).strip()])
