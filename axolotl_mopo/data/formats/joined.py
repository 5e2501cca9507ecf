"""HelpSteer2's ratings, for its preference part, whose rows hold none."""

from collections.abc import Mapping

from axolotl_mopo.data.formats.rated import helpsteer_scores
from axolotl_mopo.data.options import HelpSteer2Options
from axolotl_mopo.data.rows import DataError, fingerprint

Ratings = Mapping[int, Mapping[str, float]]
"""The scores of responses by `rating_key`."""

_COLUMNS = ("prompt", "response")


def load_ratings(options: HelpSteer2Options) -> Ratings | None:
    """The ratings that the entry names; None where it names none.

    A response that is there twice with different ratings has none, since nothing tells which are right.

    Raises:
        DataError: where they cannot be loaded, or are not rated responses.
    """
    if options.ratings is None:
        return None
    from axolotl_mopo.data.tables import load_table  # here, since it imports `datasets`, which takes a second

    table = load_table(options.ratings, split=options.ratings_split or "train")
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise DataError(
            f"`ratings`, {options.ratings}, has no column {', '.join(missing)}; its columns are "
            f"{', '.join(table.column_names)}; name the file of HelpSteer2's rated responses"
        )
    ratings: dict[int, dict[str, float]] = {}
    for row in table:
        scores = {name: value for name, value in helpsteer_scores(row).items() if value is not None}
        key = rating_key(row["prompt"], row["response"])
        ratings[key] = scores if ratings.setdefault(key, scores) == scores else {}
    return ratings


def rating_key(prompt: object, response: object) -> int:
    """A name that a rated response shares with the same response of a pair, up to white space around the texts."""
    return fingerprint([str(prompt).strip(), str(response).strip()])
