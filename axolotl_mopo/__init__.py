"""MODPO and AMoPO, two multi-objective preference-tuning methods, as an Axolotl plugin.

The face of the package: the plugin, and the strategies that a data set's `type:` names.
"""

from typing import TYPE_CHECKING, Any

import axolotl_mopo.rewards  # noqa: F401 (enters the reward sources into their table)
from axolotl_mopo.version import __version__

if TYPE_CHECKING:
    from axolotl_mopo.plugin import MOPOPlugin

__all__ = ["MOPOPlugin", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the plugin and the strategies only when they are asked for, so that naming the package costs no time.

    A strategy's name may carry `@` and the key of its data set's settings, as `axolotl_mopo.data.entries` writes it.
    """
    if name == "MOPOPlugin":
        from axolotl_mopo.plugin import MOPOPlugin

        return MOPOPlugin
    if name.startswith("_"):
        raise AttributeError(name)
    from axolotl_mopo.data.strategies import find_strategy

    return find_strategy(name)
