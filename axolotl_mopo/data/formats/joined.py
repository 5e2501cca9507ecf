"""HelpSteer2's ratings, for its preference part, whose rows hold none."""

from collections.abc import Callable

from axolotl_mopo.data.formats.rated import HELPSTEER_ATTRIBUTES, helpsteer_scores
from axolotl_mopo.data.options import HelpSteer2Options
from axolotl_mopo.data.rows import PreferencePair, RatedResponse, Row
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import DataError, RowError

Join = Callable[[Row, PreferencePair], PreferencePair]
"""A row and the pair that was read from it -> the pair with what it is joined with."""

RATED_COLUMNS = frozenset(f"{name}_{number}" for name in HELPSTEER_ATTRIBUTES for number in (1, 2))
"""Ratings that a row of the preference part may hold itself."""

_COLUMNS = ("prompt", "response")


def join_ratings(options: HelpSteer2Options) -> Join | None:
    """Adds the ratings that the entry names to pairs; None where it names none.

    A response that is not rated has no scores.

    Raises:
        DataError: where they cannot be loaded.
        RowError: from the result, where a row holds ratings itself.
    """
    if options.ratings is None:
        return None
    ratings = _load_ratings(options.ratings, options.ratings_split or "train")

    def join(row: Row, pair: PreferencePair) -> PreferencePair:
        if own := [name for name in row if name in RATED_COLUMNS]:
            raise RowError(f"it holds ratings itself, in `{own[0]}`; remove `ratings` from the entry")
        sides = (
            RatedResponse(side.text, ratings.get(_rating_key(row["prompt"], side.text), {}))
            for side in (pair.chosen, pair.rejected)
        )
        return PreferencePair(pair.prompt, *sides)

    return join


def _load_ratings(source: str, split: str) -> dict[int, dict[str, float]]:
    """The scores of responses by `_rating_key`.

    A response that is there twice with different ratings has none, since nothing tells which are right.

    Raises:
        DataError: where they cannot be loaded, or are not rated responses.
    """
    from axolotl_mopo.data.tables import load_table  # here, since it imports `datasets`, which takes a second

    table = load_table(source, split=split)
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise DataError(
            f"`ratings`, {source}, has no column {', '.join(missing)}; its columns are "
            f"{', '.join(table.column_names)}; name the file of HelpSteer2's rated responses"
        )
    ratings: dict[int, dict[str, float]] = {}
    for row in table:
        scores = {name: value for name, value in helpsteer_scores(row).items() if value is not None}
        key = _rating_key(row["prompt"], row["response"])
        ratings[key] = scores if ratings.setdefault(key, scores) == scores else {}
    return ratings


def _rating_key(prompt: object, response: object) -> int:
    """A name that a rated response shares with the same response of a pair, up to white space around the texts."""
    return fingerprint([str(prompt).strip(), str(response).strip()])
