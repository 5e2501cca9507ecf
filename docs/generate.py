"""Write the reference pages that follow from the code: configuration, command line, metrics.

python docs/generate.py            # writes docs/reference/{configuration,cli,metrics}.md
python docs/generate.py --check    # fails where a page is out of date
"""

import argparse
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from axolotl_mopo.cli import mopo
from axolotl_mopo.config import METHODS, Directives, MethodConfig
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.rewards import SOURCES, RewardSource
from axolotl_mopo.training.metrics import METRICS

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code; edit the descriptions there. -->"
LONGEST_DEFAULT = 60
NAMES = {str: "text", bool: "`true` or `false`", int: "whole number", float: "number", Any: "text, number or boolean"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text in which Markdown sees no HTML outside code."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return "`".join(parts)


def kind(annotation: Any) -> str:
    """The type of a setting, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "source of a margin" if get_origin(arguments[0]) is Annotated else kind(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(kind(argument) for argument in arguments if argument is not type(None))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"[{', '.join(map(kind, arguments))}]"
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {kind(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default(field: FieldInfo) -> str:
    """What is used where the YAML does not set the field."""
    if field.is_required():
        return "required"
    value = field.default
    if value is None or isinstance(value, BaseModel):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    text = str(value)
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else "below"


def cells(name: str, field: FieldInfo) -> list[str]:
    """The row of a setting.

    Raises:
        ValueError: where its description is missing.
    """
    if not field.description:
        raise ValueError(f"the setting {name} has no description")
    annotation: Any = field.annotation
    if field.metadata and not get_args(annotation):
        annotation = Annotated[annotation, *field.metadata]
    return [f"`{name}`", kind(annotation), default(field), escaped(field.description)]


def settings(model: type[BaseModel], without: type[BaseModel] | None = None) -> str:
    """The settings of a block, but for those that it shares with another one."""
    shared = without.model_fields if without else {}
    fields = {name: field for name, field in model.model_fields.items() if name not in shared and name != "source"}
    if not fields:
        return "It has no settings of its own."
    return table(("key", "type", "default", "meaning"), (cells(name, field) for name, field in fields.items()))


def summary(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return escaped(" ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()))


def entries() -> str:
    """The keys of data-set entries, with the types that know them."""
    known: dict[str, tuple[FieldInfo, list[str]]] = {}
    for name, shape in FORMATS.items():
        for key, field in shape.options.model_fields.items():
            known.setdefault(key, (field, []))[1].append(name)

    def where(names: list[str]) -> str:
        if len(names) == len(FORMATS):
            return "all"
        if len(names) > len(FORMATS) / 2:
            return f"all but {', '.join(f'`{name}`' for name in FORMATS if name not in names)}"
        return ", ".join(f"`{name}`" for name in names)

    rows = ([*cells(key, field), where(names)] for key, (field, names) in known.items())
    return table(("key", "type", "default", "meaning", "types of data"), rows)


def configuration() -> str:
    """The page of all settings."""
    parts = [
        "# Configuration",
        NOTE,
        "The settings of a method are in the block of its name. An unknown key is refused, with a suggestion, and so "
        "are NaN and infinity. In a sweep a dotted key such as `modpo.weights` replaces one setting of a block. All "
        "other keys of the YAML are Axolotl's; those that are refused are listed in "
        "[what is supported](../support.md#refused).",
        "## Settings of every method",
        "These keys may be in the block of either method.",
        settings(MethodConfig),
    ]
    for name, block in METHODS.items():
        parts += [f"## `{name}:`", settings(block, MethodConfig)]
    parts += [
        "### `directives:`",
        summary(Directives),
        settings(Directives),
        *(f"Default of `{name}`:\n\n```jinja\n{field.default}\n```" for name, field in Directives.model_fields.items()),
        "## Sources of margins",
        "Every margin of `modpo.margins` has a `source`. The other keys depend on it.",
        "### Keys of every margin",
        settings(RewardSource),
    ]
    for name, margin in SOURCES.items():
        parts += [f"### `source: {name}`", summary(margin), settings(margin, RewardSource)]
    parts += [
        "## Entries of datasets",
        "The keys of an entry of `datasets:` or `test_datasets:` besides Axolotl's own (`path`, `name`, `split`, "
        "`data_files`, `revision`, `ds_type`, `type`). Which type reads which data set is in "
        "[data sets](datasets.md).",
        entries(),
    ]
    return page(parts)


def values(parameter: click.Parameter) -> str:
    """What an option takes."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "flag"
    if isinstance(parameter.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in parameter.type.choices)
    name = {"integer": "whole number", "float": "number", "integer range": "whole number", "float range": "number"}
    text = name.get(parameter.type.name, parameter.type.name)
    if isinstance(parameter.type, click.types._NumberRangeBase):
        low, high = parameter.type.min, parameter.type.max
        text += f", {low} to {high}" if high is not None else f", at least {low}"
    return f"{text}; may be repeated" if parameter.multiple else text


def option(parameter: click.Option) -> list[str]:
    """The row of an option.

    Raises:
        ValueError: where its help is missing.
    """
    if not parameter.help:
        raise ValueError(f"the option {parameter.opts[0]} has no help")
    shown = ""
    if parameter.required:
        shown = "required"
    elif not (parameter.is_flag or parameter.multiple) and isinstance(parameter.default, str | int | float):
        shown = f"`{parameter.default}`"
    return [", ".join(f"`{name}`" for name in parameter.opts), values(parameter), shown, escaped(parameter.help)]


def command(path: str, known: click.Command) -> Iterator[str]:
    """The sections of a command and of those below it."""
    context = click.Context(known, info_name=path)
    usage = " ".join([path, *known.collect_usage_pieces(context)])
    help = inspect.cleandoc(known.help or "")
    if isinstance(known, click.Group):
        yield help
        for name in sorted(known.commands):
            yield from command(f"{path} {name}", known.commands[name])
        return
    yield f"## `{path}`"
    yield f"```text\n{usage}\n```"
    yield escaped(help)
    options = [parameter for parameter in known.params if isinstance(parameter, click.Option)]
    yield table(("option", "value", "default", "meaning"), map(option, options))


def command_line() -> str:
    """The page of all commands."""
    return page(["# Command line", NOTE, *command("axolotl mopo", mopo)])


def metrics() -> str:
    """The page of all metrics."""
    rows = []
    for metric in METRICS:
        rows.append([f"`{metric.name}`", *("yes" if method in metric.methods else "" for method in METHODS)])
        rows[-1].append(escaped(metric.meaning))
    return page(
        [
            "# Metrics",
            NOTE,
            "Means over every pair of the logging window and of all ranks, in addition to Axolotl's own keys (`loss`, "
            "`learning_rate`, `grad_norm` and others). In evaluation the names begin with `eval_`. `<margin>` is the "
            "name of a margin; `<dimension>` is the name of a dimension, or `integrated`.",
            table(("metric", *METHODS, "meaning"), rows),
            "The formulas behind the names are in [MODPO in one page](../explanation/modpo.md) and "
            "[AMoPO in one page](../explanation/amopo.md).",
        ]
    )


def page(parts: Iterable[str]) -> str:
    """Sections as a page."""
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "cli.md": command_line,
    "metrics.md": metrics,
}


def stale() -> list[str]:
    """The names of pages that are out of date."""
    paths = {name: FOLDER / name for name in PAGES}
    return [name for name, path in paths.items() if not path.exists() or path.read_text("utf-8") != PAGES[name]()]


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description="Write the reference pages that follow from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where a page is out of date")
    names = stale()
    if parser.parse_args().check and names:
        sys.exit(f"docs/reference: {', '.join(names)} out of date; run `python docs/generate.py`")
    for name in names:
        (FOLDER / name).write_text(PAGES[name](), "utf-8")


if __name__ == "__main__":
    main()
