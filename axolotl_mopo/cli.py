"""`axolotl mopo ...`: what one does before and after training."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from axolotl_mopo.commands.init import init
from axolotl_mopo.commands.smoke import smoke
from axolotl_mopo.config import parse_settings
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.options import ObjectiveOptions, PairsOptions
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.commands import front, generate, score

F = TypeVar("F", bound=Callable[..., Any])

_FAULTS = (OSError, ValueError, yaml.YAMLError)
"""What can be wrong with files, data and settings, our own errors among them; anything else shows its traceback."""

_FIELDS = [name for name in PairsOptions.model_fields if name.startswith("field_")]


@click.group()
def mopo() -> None:
    """Multi-objective preference tuning: its data, its prompts, and the front that it leads to."""


for _command in (init, smoke, generate, score, front):
    mopo.add_command(_command)


def _field_options(command: F) -> F:
    for name in reversed(_FIELDS):
        help = f"{PairsOptions.model_fields[name].description} (--type pairs)"
        command = click.option(f"--{name.replace('_', '-')}", name, help=help)(command)
    return command


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    names = [name.strip() for name in value.split(",")] if value else []
    if len(set(names)) < len(names) or "" in names:
        raise click.BadParameter(f"{value!r} names one twice, or nothing")
    return names or None


def _where(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any] | None:
    where = {}
    for given in values:
        column, equals, value = given.partition("=")
        if not equals or not column or column in where:
            raise click.BadParameter(f"{given!r} is not COLUMN=VALUE, or names a column for the second time")
        where[column] = value
    return where or None


@mopo.command()
@click.argument("source")
@click.option("--type", "kind", type=click.Choice(list(FORMATS)), required=True, help="The shape of the rows.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="A .jsonl or a .parquet file.")
@click.option("--split", default="train", show_default=True, help="A split, or a part such as train[:1000].")
@click.option("--name", help="The configuration of a data set of the hub.")
@click.option("--data-files", multiple=True, help="Files in the data set; may be repeated.")
@click.option("--revision", help="The revision of a data set of the hub.")
@click.option("--objective", callback=_names, help="What orders rated responses: a score, or a,b for the mean.")
@click.option("--attributes", callback=_names, help="The scores to keep and to compare: a,b,c; by default all.")
@click.option("--max-pairs-per-prompt", type=click.IntRange(min=1), help="Keep at most so many pairs of a prompt.")
@click.option("--seed", default=42, show_default=True, help="Draws the pairs that are kept.")
@click.option(
    "--on-bad-row",
    type=click.Choice(["raise", "drop"]),
    default="raise",
    show_default=True,
    help="raise: stop at a bad row and name it; drop: leave bad rows out and count them.",
)
@click.option("--where", multiple=True, callback=_where, help="COLUMN=VALUE: read only rows with it; may be repeated.")
@click.option("--keep-unfinished", is_flag=True, default=None, help="Keep responses that were cut off (responses).")
@click.option("--ratings", help="HelpSteer2's rated responses, to join its preferences with (helpsteer2).")
@click.option("--ratings-split", help="The split of --ratings; train where omitted (helpsteer2).")
@click.option("--min-score-ratio", type=float, help="Leave out pairs whose votes are closer than this (shp).")
@_field_options
def pairs(
    source: str,
    kind: str,
    output: Path,
    split: str,
    name: str | None,
    data_files: tuple[str, ...],
    revision: str | None,
    objective: list[str] | None,
    attributes: list[str] | None,
    seed: int,
    **options: Any,
) -> None:
    """Turn SOURCE, a local file, a folder or a data set of the hub, into canonical pairs.

    They are what `type: axolotl_mopo.pairs` reads. The summary tells how far the objectives conflict.
    """
    from axolotl_mopo.data.export import export_pairs, summary
    from axolotl_mopo.data.pairing import PairReader
    from axolotl_mopo.data.spec import DataSpec
    from axolotl_mopo.data.tables import load_table

    format = FORMATS[kind]
    given = {name: value for name, value in options.items() if value is not None}
    if issubclass(format.options, ObjectiveOptions) and objective:
        given["objective"] = objective
    try:
        if fault := format.objective_fault(objective or []):
            raise ConfigError(f"--objective: {fault}")
        for option in set(given) - set(format.options.model_fields):
            raise ConfigError(f"--{option.replace('_', '-')} has no effect with --type {kind}")
        block = parse_settings(format.options, given, f"--type {kind}")
        table = load_table(source, split=split, name=name, data_files=data_files, revision=revision)
        spec = DataSpec(where=source, strategy=kind, options=block, objective=tuple(objective or ()), seed=seed)
        reader = PairReader(table, spec)
        export_pairs(reader, output, attributes)
    except _FAULTS as error:
        raise click.ClickException(str(error)) from None
    names = attributes or reader.stats.names
    click.echo(summary(reader.stats, names))
    click.echo(f"\n{output} is written. In the YAML:\n\n{_entry(output, names, kind)}")


def _entry(output: Path, names: list[str], kind: str) -> str:
    """The data-set entry that reads the file."""
    entry: dict[str, Any] = {"path": str(output), "type": "axolotl_mopo.pairs"}
    if output.suffix == ".jsonl":
        entry["ds_type"] = "json"
    known = FORMATS[kind].scales
    scales = {known[name] for name in names if name in known}
    if len(scales) == 1:
        entry["score_scale"] = list(scales.pop())
    text = yaml.safe_dump({"datasets": [entry]}, sort_keys=False, default_flow_style=None)
    if len(scales) > 1:
        text += "# Its scores have several scales; keep those of one, with --attributes, for AMoPO's directives.\n"
    return text


@mopo.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--dataset",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Which entry of `datasets:` the row is of.",
)
@click.option(
    "--row", type=click.IntRange(min=0), default=0, show_default=True, help="The first pair of this row or a later one."
)
@click.option("--question", help="A question of your own in the place of a row's.")
@click.option("--dimension", help="Ask for this dimension at inference, and not for all together.")
@click.option("--score", type=float, help="Which score of the dimension to ask for; by default the best.")
@click.option("--json", "as_json", is_flag=True, help="Messages and texts as JSON.")
@click.option("--template", is_flag=True, help="A chat template with the directive for inference built in.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="A file; the terminal where omitted.")
def directives(
    config: str,
    dataset: int,
    row: int,
    question: str | None,
    dimension: str | None,
    score: float | None,
    as_json: bool,
    template: bool,
    output: Path | None,
) -> None:
    """Print the prompts that AMoPO trains with by CONFIG, and the one to use at inference."""
    from axolotl_mopo.data.preview import preview

    logging.disable(logging.INFO)  # or else the host prints the whole configuration
    try:
        shown = preview(config, dataset=dataset, row=row, question=question, dimension=dimension, score=score)
    except _FAULTS as error:
        raise click.ClickException(str(error)) from None
    if template:
        text = shown["chat_template"]
    elif as_json:
        text = json.dumps({key: shown[key] for key in ("training", "inference")}, indent=2, ensure_ascii=False)
    else:
        entries = [("training", prompt) for prompt in shown["training"]] + [("inference", shown["inference"])]
        text = "\n\n".join(f"=== {use}: {prompt['name']}\n{prompt['text']}" for use, prompt in entries)
    if not template:
        text += "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(str(error)) from None
