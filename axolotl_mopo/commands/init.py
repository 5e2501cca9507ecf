"""`axolotl mopo init`: write a configuration for a data set that trains without changes."""

import json
import re
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import click

from axolotl_mopo.commands.options import field_options
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.files import is_hub_name

_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow", ".gz", ".zst", ".bz2", ".xz")


@click.command()
@click.option("--method", type=click.Choice(["modpo", "amopo"]), help="Training method.")
@click.option("--data", "source", help="Preference data: a local file, a folder or a data set of the hub.")
@click.option("--base-model", help="Base model: a folder or a model of the hub.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default="config.yaml",
    show_default=True,
    help="YAML file to write; it must not exist.",
)
@click.option("--split", default="train", show_default=True, help="A split, or a part such as train[:1000].")
@click.option("--name", help="Configuration of a data set of the hub.")
@click.option("--type", "kind", type=click.Choice(list(FORMATS)), help="Format of the rows; detected by default.")
@click.option("--objective", help="Name of the score that orders rated responses.")
@field_options
def init(
    method: str | None,
    source: str | None,
    base_model: str | None,
    output: Path,
    split: str,
    name: str | None,
    kind: str | None,
    objective: str | None,
    **fields: str | None,
) -> None:
    """Write a commented configuration that trains on preference data.

    Missing options are asked for in a terminal. The columns of the data determine its format and the objectives.
    Existing files are not overwritten.
    """
    _refuse_existing(output)
    method = method or _ask("--method", "Method", type=click.Choice(["modpo", "amopo"]), default="modpo")
    source = source or _ask("--data", "Preference data (a file, a folder or a data set of the hub)")
    _refuse_missing("--data", source)
    base_model = base_model or _ask("--base-model", "Base model", default="Qwen/Qwen2.5-7B-Instruct")
    _refuse_missing("--base-model", base_model)
    options = {key: value for key, value in fields.items() if value is not None}
    try:
        written, lines = configuration(
            method, source, base_model, output, split=split, name=name, kind=kind, objective=objective, options=options
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("x", encoding="utf-8") as file:
            file.write(written)
    except FileExistsError:
        _refuse_existing(output)
        raise
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{source}: {error}") from None
    for line in lines:
        click.echo(line)
    click.echo(f"\nWrote {output}. Next:\n  axolotl mopo smoke {output}\n  axolotl train {output}")


def configuration(
    method: str,
    source: str,
    base_model: str,
    output: Path,
    *,
    split: str,
    name: str | None,
    kind: str | None,
    objective: str | None,
    options: dict[str, Any],
) -> tuple[str, list[str]]:
    """Make a configuration and check that it reads the data.

    Returns:
        The YAML, and lines that explain the choices.

    Raises:
        ConfigError, DataError: if the data cannot be read, or lacks what the method needs.
    """
    from axolotl_mopo.commands.recognition import recognize
    from axolotl_mopo.commands.starting_config import decide, text
    from axolotl_mopo.data.tables import load_table

    if Path(source, "dataset_dict.json").exists() and split != "train":
        raise ConfigError("Axolotl reads only the split train of a data set of save_to_disk; remove --split")
    with redirect_stderr(StringIO()):  # progress bars of `datasets`
        table = load_table(source, split=split, name=name)
    found = recognize(table, kind, options, objective)
    if objective and not found.objective:
        raise ConfigError(f"--objective has no effect, since a label orders the pairs of {found.kind}; remove it")
    decisions = decide(found, method)
    written = text(
        method=method,
        output=str(output),
        base_model=base_model,
        has_template=_has_template(base_model),
        source=_source(source, split, name),
        found=found,
        decisions=decisions,
        name=f"{method}-{_run_name(source)}",
    )
    pairs = _read_back(written, table)
    rows = found.stats.rows
    return written, [
        f"The columns of {source} are {', '.join(table.column_names)}.",
        f"They are read as `type: axolotl_mopo.{found.kind}`: {pairs:,} pairs of the first {rows:,} rows.",
        *decisions.reasons,
        *([f"Other scores are {', '.join(decisions.others)}."] if decisions.others else []),
    ]


def _read_back(written: str, table: Any) -> int:
    """Read the first rows with the new configuration, as training does, and count the pairs.

    Raises:
        ConfigError, DataError: if training would refuse the configuration or the rows.
    """
    import yaml

    from axolotl_mopo.commands.recognition import ROWS
    from axolotl_mopo.config import read_method
    from axolotl_mopo.data.entries import bind_entries
    from axolotl_mopo.data.pairing import PairReader
    from axolotl_mopo.data.spec import DataSpec

    cfg = yaml.safe_load(written)
    block = read_method(cfg, cfg["rl"])
    bind_entries(cfg, block)
    (settings,) = cfg["mopo_data"].values()
    spec = DataSpec.model_validate(settings)
    rows = table.select(range(min(len(table), ROWS)))
    with redirect_stderr(StringIO()):
        return sum(1 for _ in PairReader(rows, spec).pairs())


def _source(source: str, split: str, name: str | None) -> dict[str, Any]:
    """The keys of a data-set entry that locate the data."""
    entry = {"path": source}
    if any(suffix in (".json", ".jsonl") for suffix in Path(source).suffixes) and Path(source).is_file():
        entry["ds_type"] = "json"
    if name is not None:
        entry["name"] = name
    return {**entry, "split": split}


def _has_template(base_model: str) -> bool | None:
    """Whether the tokenizer in a local folder has a chat template; None if unknown, as for a model of the hub."""
    folder = Path(base_model)
    if not folder.is_dir():
        return None
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return None


def _run_name(source: str) -> str:
    """A name for the run's folder, with letters, digits and dashes only."""
    stem = Path(source).name.split(".")[0] or "data"
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "data"


def _ask(option: str, prompt: str, **settings: Any) -> str:
    if not _is_terminal():
        raise click.UsageError(f"Missing option '{option}' (there is no terminal to ask for it).")
    return str(click.prompt(prompt, **settings))


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise click.ClickException(f"{output} exists already; move it away, or name another file with --output")


def _refuse_missing(option: str, path: str) -> None:
    """Refuse a path that can only be local and does not exist."""
    if Path(path).exists():
        return
    local = path.endswith(_SUFFIXES) or not is_hub_name(path) or path.startswith((".", "~"))
    if local or ("/" in path and Path(path).parent.is_dir()):
        raise click.ClickException(
            f"{option}: there is no file or folder {path} (the working folder is {Path.cwd()}); check the path"
        )
