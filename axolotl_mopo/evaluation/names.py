"""Check the names of policies and objectives, which become file names, column names and arguments."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

from axolotl_mopo.data.formats.rated import RESPONSE_COLUMNS

_LONGEST = 200
_FIXED_COLUMNS = ("policy", "kind", "weights", "tokens", "finished", "on_front", "dominated_by")
_DIVERGENCE = "kl"
_PARTS = ("", "_low", "_high", "_win_rate")
"""Suffixes of an objective's columns in `front.csv`; the divergence has all but the last."""


def check_name(name: str) -> str:
    """Refuse a name that cannot be a file name, a column name or an argument.

    Raises:
        ValueError: if the name is wrong; lists the allowed characters.
    """
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > _LONGEST or not name.isprintable():
        raise ValueError(
            f"the name {name!a} is not allowed; use letters, digits, `_`, `-` and `.`, {_LONGEST} bytes at most, and "
            "begin with a letter, a digit or `_`"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]


def check_policies(names: Iterable[str]) -> None:
    """Refuse names that are the same file on a case-insensitive file system.

    Raises:
        ValueError: if two names differ only by case; names the first two.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"the policies {other} and {name} would share a file; give one another name, as NAME=PATH")


def check_objectives(names: Iterable[str]) -> None:
    """Refuse names of objectives whose columns clash with others in a response or in `front.csv`.

    Raises:
        ValueError: if a column is taken; names the objective and the column.
    """
    taken = Counter([*_FIXED_COLUMNS, *RESPONSE_COLUMNS, *(_DIVERGENCE + part for part in _PARTS)])
    names = list(names)
    taken.update(name + part for name in names for part in _PARTS)
    for name in names:
        if taken_twice := [name + part for part in _PARTS if taken[name + part] > 1]:
            raise ValueError(
                f"the objective {name} needs the column {taken_twice[0]}, which is taken; choose another name"
            )
