"""Whether the installed Axolotl is one that this package can work with."""

import os
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from axolotl_mopo.errors import ConfigError


def tested_range() -> SpecifierSet:
    """The versions of Axolotl that this package is tested with, as its own metadata says them."""
    requirements = map(Requirement, requires("axolotl-mopo") or [])
    return next(requirement.specifier for requirement in requirements if requirement.name == "axolotl")


def version_advice(installed: str | None = None) -> str | None:
    """What to tell of an Axolotl outside the tested range; None within it."""
    installed, tested = installed or version("axolotl"), tested_range()
    if tested.contains(installed, prereleases=True):
        return None
    return (
        f"Axolotl {installed} is installed, which this version of axolotl-mopo was not tested with; if anything fails, "
        f'pip install "axolotl{tested}".'
    )


def check_hooks(plugin: type, base: type) -> None:
    """Hold a plugin against the class that the host calls it by.

    Args:
        plugin: whose public methods are all hooks.
        base: the host's class of plugins.

    Raises:
        ConfigError: where the host has no such hook, and would never call it.
    """
    if missing := [name for name in vars(plugin) if not name.startswith("_") and not hasattr(base, name)]:
        raise ConfigError(
            f"Axolotl {version('axolotl')} does not call {', '.join(f'`{name}`' for name in missing)} of its plugins, "
            f'which axolotl-mopo needs; pip install "axolotl{tested_range()}"'
        )


def check_devices() -> None:
    """Refuse a process without a launcher that sees several GPUs.

    Raises:
        ConfigError: how to start it.
    """
    import torch

    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"a single process sees {torch.cuda.device_count()} GPUs, over which it would copy or split the model "
            "(nn.DataParallel, `device_map`), which does not work; leave out `--launcher python`, so that every GPU "
            "gets a process, or let it see one, by CUDA_VISIBLE_DEVICES=0"
        )
