"""Check that the installed Axolotl and the way the run was started are supported."""

import os
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from axolotl_mopo.errors import ConfigError


def tested_range() -> SpecifierSet:
    """The versions of Axolotl that this package is tested with, from its own metadata."""
    requirements = map(Requirement, requires("axolotl-mopo") or [])
    return next(requirement.specifier for requirement in requirements if requirement.name == "axolotl")


def version_advice(installed: str | None = None) -> str | None:
    """A warning about an Axolotl outside the tested range; None inside it."""
    installed, tested = installed or version("axolotl"), tested_range()
    if tested.contains(installed, prereleases=True):
        return None
    return (
        f"Axolotl {installed} is installed, but this version of axolotl-mopo was not tested with it; if anything "
        f'fails, run `pip install "axolotl{tested}"`.'
    )


def check_hooks(plugin: type, base: type) -> None:
    """Check that Axolotl calls every hook of a plugin.

    Args:
        plugin: class whose public methods are all hooks.
        base: Axolotl's base class of plugins.

    Raises:
        ConfigError: if Axolotl does not have a hook and would never call it.
    """
    if missing := [f"`{name}`" for name in vars(plugin) if not name.startswith("_") and not hasattr(base, name)]:
        raise ConfigError(
            f"Axolotl {version('axolotl')} does not call the plugin hooks {', '.join(missing)}, "
            f'which axolotl-mopo needs; run `pip install "axolotl{tested_range()}"`'
        )


def check_devices() -> None:
    """Refuse a single process that sees several GPUs.

    Raises:
        ConfigError: if no launcher started the process and it sees more than one GPU.
    """
    import torch

    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"a single process sees {torch.cuda.device_count()} GPUs and would copy or split the model over them "
            "(nn.DataParallel, `device_map`), which does not work; remove `--launcher python` to start one process for "
            "each GPU, or set CUDA_VISIBLE_DEVICES=0 to use one GPU"
        )
