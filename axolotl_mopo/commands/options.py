"""Options that several commands have."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from axolotl_mopo.data.options import PairsOptions

F = TypeVar("F", bound=Callable[..., Any])

_FIELDS = [name for name in PairsOptions.model_fields if name.startswith("field_")]


def field_options(command: F) -> F:
    """Add an option for every key of `type: axolotl_mopo.pairs` that names a column."""
    for name in reversed(_FIELDS):
        help = f"{PairsOptions.model_fields[name].description} (--type pairs)"
        command = click.option(f"--{name.replace('_', '-')}", name, help=help)(command)
    return command
