"""`axolotl mopo ...`: commands to run before and after training."""

import json
import logging
from pathlib import Path
from typing import Any

import click
import yaml

import axolotl_mopo.rewards  # noqa: F401 (enters the sources that commands read settings of)
from axolotl_mopo.commands.init import init
from axolotl_mopo.commands.options import field_options
from axolotl_mopo.commands.smoke import smoke
from axolotl_mopo.config import parse_settings
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.options import ObjectiveOptions
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.commands import front, generate, score

_USER_ERRORS = (OSError, ValueError, yaml.YAMLError)
"""Errors in files, data and settings, this package's own included; any other error shows its traceback."""


@click.group()
def mopo() -> None:
    """Multi-objective preference tuning: prepare data, show prompts, evaluate the Pareto front."""


for _command in (init, smoke, generate, score, front):
    mopo.add_command(_command)


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    names = [name.strip() for name in value.split(",")] if value else []
    if len(set(names)) < len(names) or "" in names:
        raise click.BadParameter(f"{value!r} has a repeated or an empty name; give each name once, as a,b,c")
    return names or None


def _where(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any] | None:
    where = {}
    for given in values:
        column, equals, value = given.partition("=")
        if not equals or not column or column in where:
            raise click.BadParameter(f"{given!r} is not COLUMN=VALUE, or repeats a column; give each column once")
        where[column] = value
    return where or None


@mopo.command()
@click.argument("source")
@click.option("--type", "kind", type=click.Choice(list(FORMATS)), required=True, help="Format of the rows.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Output file: .jsonl or .parquet.")
@click.option("--split", default="train", show_default=True, help="Split, or a part of it such as train[:1000].")
@click.option("--name", help="Configuration of a data set of the hub.")
@click.option("--data-files", multiple=True, help="Files of the data set; may be repeated.")
@click.option("--revision", help="Revision of a data set of the hub.")
@click.option("--objective", callback=_names, help="Score that orders rated responses; a,b is their mean.")
@click.option("--attributes", callback=_names, help="Scores to keep and compare: a,b,c. Default: all.")
@click.option("--max-pairs-per-prompt", type=click.IntRange(min=1), help="Largest number of pairs of one prompt.")
@click.option("--seed", default=42, show_default=True, help="Seed that draws the pairs to keep.")
@click.option(
    "--on-bad-row",
    type=click.Choice(["raise", "drop"]),
    default="raise",
    show_default=True,
    help="raise: stop at a bad row and name it; drop: leave bad rows out and count them.",
)
@click.option("--where", multiple=True, callback=_where, help="Read only rows with COLUMN=VALUE; may be repeated.")
@click.option(
    "--keep-unfinished", is_flag=True, default=None, help="Keep responses that were cut off (--type responses)."
)
@click.option("--ratings", help="Rated responses to join with the preferences (--type helpsteer2).")
@click.option("--ratings-split", help="Split of --ratings. Default: train (--type helpsteer2).")
@click.option("--min-score-ratio", type=float, help="Smallest score_ratio of a pair that is kept (--type shp).")
@field_options
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
    """Convert SOURCE, a local file, a folder or a data set of the hub, to canonical pairs.

    `type: axolotl_mopo.pairs` reads them. The summary shows how often the objectives conflict.
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
            raise ConfigError(f"--{option.replace('_', '-')} has no effect with --type {kind}; remove it")
        block = parse_settings(format.options, given, f"--type {kind}")
        table = load_table(source, split=split, name=name, data_files=data_files, revision=revision)
        spec = DataSpec(where=source, strategy=kind, options=block, objective=tuple(objective or ()), seed=seed)
        reader = PairReader(table, spec)
        export_pairs(reader, output, attributes)
    except _USER_ERRORS as error:
        raise click.ClickException(str(error)) from None
    names = attributes or reader.stats.names
    click.echo(summary(reader.stats, names))
    click.echo(f"\nWrote {output}. To train on it, put this in the YAML:\n\n{_entry(output, names, kind)}")


def _entry(output: Path, names: list[str], kind: str) -> str:
    """The entry of `datasets:` that reads the file, as YAML."""
    entry: dict[str, Any] = {"path": str(output), "type": "axolotl_mopo.pairs"}
    if output.suffix == ".jsonl":
        entry["ds_type"] = "json"
    known = FORMATS[kind].scales
    scales = {known[name] for name in names if name in known}
    if len(scales) == 1:
        entry["score_scale"] = list(scales.pop())
    text = yaml.safe_dump({"datasets": [entry]}, sort_keys=False, default_flow_style=None)
    if len(scales) > 1:
        text += "# The scores have different scales; for AMoPO, use --attributes to keep scores of one scale only.\n"
    return text


@mopo.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--dataset",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Index of the entry in `datasets:` to take the row from.",
)
@click.option(
    "--row", type=click.IntRange(min=0), default=0, show_default=True, help="Use the first pair from this row on."
)
@click.option("--question", help="Use this question instead of a row's.")
@click.option("--dimension", help="Ask for this dimension alone at inference. Default: all dimensions.")
@click.option("--score", type=float, help="Score of the dimension to ask for. Default: the best.")
@click.option("--json", "as_json", is_flag=True, help="Print messages, texts and tokens as JSON.")
@click.option("--template", is_flag=True, help="Print a chat template that contains the directive for inference.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Output file. Default: the terminal.")
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
    """Print the prompts that AMoPO trains with under CONFIG, and the prompt to use at inference.

    For a row, also the tokens of both responses; those that are trained on are green and between >> and <<.
    """
    from axolotl_mopo.data.preview import preview
    from axolotl_mopo.data.shown_tokens import as_text

    logging.disable(logging.INFO)  # otherwise Axolotl prints the whole configuration
    try:
        shown = preview(config, dataset=dataset, row=row, question=question, dimension=dimension, score=score)
    except _USER_ERRORS as error:
        raise click.ClickException(str(error)) from None
    if template:
        text = shown["chat_template"]
    elif as_json:
        parts = ("training", "inference", "responses")
        text = json.dumps({key: shown[key] for key in parts if key in shown}, indent=2, ensure_ascii=False)
    else:
        entries = [("training", prompt) for prompt in shown["training"]] + [("inference", shown["inference"])]
        text = "\n\n".join(f"=== {use}: {prompt['name']}\n{prompt['text']}" for use, prompt in entries)
        if "responses" in shown:
            text += f"\n\n{as_text(shown['responses'])}"
    if not template:
        text += "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(click.unstyle(text), encoding="utf-8")
    except OSError as error:
        raise click.ClickException(str(error)) from None
