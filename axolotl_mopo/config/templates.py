"""Directives as Jinja templates, rendered in a sandbox because a shared YAML is untrusted."""

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
"""Largest number of whole scores that a template is tried with; as many scores between them are tried too."""
_SHOWN = 200
_SECONDS = 0.5
"""CPU time for the trials of one template; no further values are tried after it."""


def readable_number(value: float) -> float:
    """A score rounded for reading: 4 instead of 4.0, 3.33 instead of 3.3333333."""
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


def readable_names(dimensions: Iterable[str]) -> list[str]:
    """Names of dimensions in a directive, with spaces instead of underscores."""
    return [dimension.replace("_", " ") for dimension in dimensions]


def dimension_values(
    dimension: str, score: float, dimensions: Sequence[str], score_range: tuple[float, float]
) -> dict[str, Any]:
    """Variables of the directive of one dimension."""
    (name,) = readable_names([dimension])
    return {"dimension": name, "score": readable_number(score), **integrated_values(dimensions, score_range)}


def integrated_values(dimensions: Sequence[str], score_range: tuple[float, float]) -> dict[str, Any]:
    """Variables of the directive of all dimensions."""
    low, high = map(readable_number, score_range)
    return {"low": low, "high": high, "dimensions": readable_names(dimensions)}


def tried_values(
    known: Set[str], dimensions: Sequence[str], score_range: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """Values to try a template with: every dimension at scores across the range."""
    if "score" not in known:
        yield integrated_values(dimensions, score_range)
        return
    for score in _tried_scores(*score_range):
        for dimension in dimensions:
            yield dimension_values(dimension, score, dimensions, score_range)


def _tried_scores(low: float, high: float) -> list[float]:
    """The ends and the middle of a range, its whole numbers, and the numbers halfway between them."""
    first, last = int(-(-low // 1)), int(high // 1)
    whole = range(first, last + 1, 1 + (last - first) // _MOST_SCORES)
    scores = [low, high, (low + high) / 2, *whole, *(number + 0.5 for number in whole if number + 0.5 < high)]
    return list(dict.fromkeys(map(readable_number, scores)))


def check(template: str, known: Set[str], trials: Iterable[Mapping[str, Any]] = (_EXAMPLE,)) -> None:
    """Render a template with trial values, so that errors show before any row is read.

    Args:
        template: text of the template.
        known: names of the variables that it may use.
        trials: values of these variables.

    Raises:
        ValueError: if the template uses another variable, cannot be rendered, or renders to an empty text.
    """
    if unknown := variables(template) - known:
        unknown_names, known_names = ", ".join(sorted(unknown)), ", ".join(sorted(known))
        raise ValueError(f"unknown variable {unknown_names}; the known variables are {known_names}")
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
            raise ValueError(f"it renders to an empty text{_at(given)}")


def _at(values: Mapping[str, Any]) -> str:
    return f" for {values['dimension']} at the score {values['score']}" if "score" in values else ""


def _template(value: Any, info: ValidationInfo) -> Any:
    """The text of a template, read from the file if the YAML names one."""
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
    """Read a template file.

    A shared YAML must not be able to put any file of the machine into prompts and saved models.

    Args:
        name: path relative to the working directory.
        folder: folder that must contain the file, directly or in a subfolder, after links are resolved.

    Raises:
        ValueError: if the file is outside the folder, or its name does not end with .jinja.
        OSError: if the file cannot be read.
    """
    path = Path(name).resolve()
    if not (name.endswith(".jinja") and path.name.endswith(".jinja")):
        to = "" if path.name == Path(name).name else f", a link to {path.name},"
        raise ValueError(f"the file {name}{to} is not a template; its name must end with .jinja")
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"the file {name} is outside {folder.resolve()}, the folder of the YAML; move it into this folder"
        )
    return read_file(path, 4 * LONGEST_TEMPLATE, follow_links=False).decode("utf-8").strip()


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


Template = Annotated[str, BeforeValidator(_template)]
