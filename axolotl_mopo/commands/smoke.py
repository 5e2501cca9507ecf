"""`axolotl mopo smoke`: test a configuration with two steps of a tiny model on a CPU."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

if TYPE_CHECKING:
    from axolotl_mopo.commands.smoke_plan import Plan

_FAULTS = (OSError, ValueError, ImportError, AttributeError, yaml.YAMLError)
"""Errors of files, data, settings and of the plugins that a YAML names."""
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
_SHOWN_LINES = 40
_ERROR = re.compile(r"^([\w.]*(?:Error|Exception|Exit|Interrupt|Warning)\b.*)", re.MULTILINE | re.DOTALL)
_METRIC = re.compile(r"'((?:eval_|train_)?loss)': '?(-?[\d.]+(?:e-?\d+)?|nan|inf)'?")


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--data",
    "samples",
    multiple=True,
    help="A sample of the data, in the format of its entry; may be repeated, in the order of `datasets:`.",
)
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="A new folder that keeps all files of the test."
)
@click.option("--trust-remote-code", "trust", is_flag=True, help="Allow models and tokenizers to run their own code.")
def smoke(config: Path, samples: tuple[str, ...], keep: Path | None, trust: bool) -> None:
    """Test CONFIG on a CPU: the same method, data format and keys, a tiny random model, a few rows, two steps.

    Uses the architecture, the tokenizer and the rows of CONFIG if they are available, otherwise stand-ins. Returns the
    exit code of `axolotl train`, and like it runs the functions and plugins that CONFIG names.
    """
    with _test_folder(keep) as folder:
        from axolotl_mopo.commands.smoke_plan import plan

        try:
            made = plan(config, folder, samples, trust)
        except _FAULTS as error:
            raise click.ClickException(f"{config}: {error}") from None
        for line in made.lines():
            click.echo(line)
        click.echo("\nTraining two steps, which takes about half a minute ...")
        code = train(made.config, folder / "log.txt", made.environment)
        log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if code:
        where = f"The whole log is {keep / 'log.txt'}." if keep else "--keep FOLDER keeps the whole log."
        click.echo(f"\n{reason(log)}\n\n{config} fails: axolotl train ended with exit code {code}. {where}", err=True)
        sys.exit(code if code > 0 else 1)
    click.echo(f"\n{_result(made, log)}")
    if keep:
        click.echo(f"{keep} holds the configuration, the model, the rows, what was trained, and log.txt.")


@contextmanager
def _test_folder(keep: Path | None) -> Iterator[Path]:
    """Context manager that gives a temporary folder, or the one to keep.

    Raises:
        click.ClickException: if the folder to keep is not empty.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="mopo-smoke-") as name:
            yield Path(name).resolve()
        return
    if keep.exists() and any(keep.iterdir()):
        raise click.ClickException(f"--keep: {keep} is not empty; name a new folder")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


def train(config: Path, log: Path, environment: dict[str, str]) -> int:
    """Run `axolotl train` in a subprocess and return its exit code.

    Args:
        config: configuration of the test.
        log: file for its output.
        environment: environment variables to add.
    """
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(config), "--launcher", "python"]
    with log.open("wb") as file:
        environment = {**os.environ, **_ENVIRONMENT, **environment}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)  # noqa: S603
    return done.returncode


def reason(log: str) -> str:
    """The error that ended a run: the message of the last exception, or else the last lines of the log."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    _, traceback, last = log.rpartition("Traceback (most recent call last):")
    found = _ERROR.search(last) if traceback else None
    lines = (found.group(1) if found else log).strip().splitlines()
    noise = ("nanobind:", " - leaked", " - ... skipped", "See https://nanobind")
    lines = [line for line in lines if not line.startswith(noise)]
    return "\n".join(lines[:_SHOWN_LINES] if found else lines[-_SHOWN_LINES:])


def _result(made: "Plan", log: str) -> str:
    metrics = dict(_METRIC.findall(log))
    losses = ", ".join(f"{name} {value}" for name, value in metrics.items())
    return f"{made.source} passes: two steps of {made.method} on a CPU" + (f" ({losses})." if losses else ".")
