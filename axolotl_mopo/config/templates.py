"""Directives as Jinja templates, rendered in a sandbox, since a shared YAML is not to be trusted."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo

from axolotl_mopo.config.sandbox import LONGEST_TEMPLATE, render, variables
from axolotl_mopo.files import read_file

DIMENSION = (
    "Pay attention to one quality above all: {{ dimension }}. On a scale from {{ low }} (fails on {{ dimension }}) to "
    "{{ high }} (nothing left to wish for), give an answer whose {{ dimension }} rates {{ score }}."
)
INTEGRATED = "As an expert, give the answer that does best on all of these together: {{ dimensions | join(', ') }}."

INTEGRATED_VARIABLES = frozenset({"low", "high", "dimensions"})
DIMENSION_VARIABLES = INTEGRATED_VARIABLES | {"dimension", "score"}

_EXAMPLE = {"dimension": "helpfulness", "score": 4, "low": 1, "high": 5, "dimensions": ["helpfulness", "correctness"]}
_MOST_SCORES = 100
"""Whole numbers of a range that a template is tried with, and as many numbers between them."""
_SHOWN = 200
_SECONDS = 0.5
"""CPU time of the trial of one template, after which no more values are tried."""


def readable_number(value: float) -> float:
    """A score as one would write it: 4 and not 4.0, 3.33 and not 3.3333333."""
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


def readable_names(dimensions: Iterable[str]) -> list[str]:
    """Names of dimensions as a directive spells them."""
    return [dimension.replace("_", " ") for dimension in dimensions]


def dimension_values(
    dimension: str, score: float, dimensions: Sequence[str], score_range: tuple[float, float]
) -> dict[str, Any]:
    """What the directive of one dimension can name."""
    (name,) = readable_names([dimension])
    return {"dimension": name, "score": readable_number(score), **integrated_values(dimensions, score_range)}


def integrated_values(dimensions: Sequence[str], score_range: tuple[float, float]) -> dict[str, Any]:
    """What the directive of all dimensions can name."""
    low, high = map(readable_number, score_range)
    return {"low": low, "high": high, "dimensions": readable_names(dimensions)}


def tried_values(
    known: Set[str], dimensions: Sequence[str], score_range: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """Values to try a template with: every dimension, and scores all over the range."""
    if "score" not in known:
        yield integrated_values(dimensions, score_range)
        return
    for score in _tried_scores(*score_range):
        for dimension in dimensions:
            yield dimension_values(dimension, score, dimensions, score_range)


def _tried_scores(low: float, high: float) -> list[float]:
    """The ends and the middle of a range, whole numbers in it, and the numbers between these."""
    first, last = int(-(-low // 1)), int(high // 1)
    whole = range(first, last + 1, 1 + (last - first) // _MOST_SCORES)
    scores = [low, high, (low + high) / 2, *whole, *(number + 0.5 for number in whole if number + 0.5 < high)]
    return list(dict.fromkeys(map(readable_number, scores)))


def check(template: str, known: Set[str], trials: Iterable[Mapping[str, Any]] = (_EXAMPLE,)) -> None:
    """Try a template before any row is read.

    Args:
        template: its text.
        known: the names that it may use.
        trials: values of these names.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if unknown := variables(template) - known:
        raise ValueError(f"unknown variable {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    deadline = time.thread_time() + _SECONDS
    for number, values in enumerate(trials):
        if number and time.thread_time() > deadline:
            return
        given = {name: values[name] for name in known}
        try:
            text = render(template, given)
        except ValueError as error:
            raise ValueError(f"it cannot be rendered{_at(given)}: {error}") from None
        if not text.strip():
            raise ValueError(f"it says nothing{_at(given)}")


def _at(values: Mapping[str, Any]) -> str:
    return f" for {values['dimension']} at the score {values['score']}" if "score" in values else ""


def _template(value: Any, info: ValidationInfo) -> Any:
    """The template's text, from the file where the YAML names one."""
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"file"} or not isinstance(value["file"], str):
        raise ValueError(f"it is {_shortened(dict(value))}; write the template itself, or {{file: PATH}}")
    if not info.context:
        raise ValueError("it names a file, which only the YAML of a run may do; write the template itself")
    try:
        return _read_template(value["file"], info.context["folder"])
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {value['file']} cannot be read: {error}") from None


def _read_template(name: str, folder: Path) -> str:
    """The text of a template's file.

    A shared YAML must not be able to put any file of the machine into prompts and saved models.

    Args:
        name: relative to the working directory.
        folder: where the file must be, or in a folder of it, once links are followed.

    Raises:
        ValueError: where it is elsewhere, or is no template by its name.
        OSError: where it cannot be read.
    """
    path = Path(name).resolve()
    if not (name.endswith(".jinja") and path.name.endswith(".jinja")):
        to = "" if path.name == Path(name).name else f", a link to {path.name},"
        raise ValueError(f"the file {name}{to} is not a template; its name must end with .jinja")
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"the file {name} is outside {folder.resolve()}, the folder of the YAML; put it there or in a folder of it"
        )
    return read_file(path, 4 * LONGEST_TEMPLATE, follow_links=False).decode("utf-8").strip()


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


Template = Annotated[str, BeforeValidator(_template)]
