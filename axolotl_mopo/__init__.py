"""MODPO and AMoPO, two multi-objective preference-tuning methods, as an Axolotl plugin.

Exports the plugin and the strategies that the `type:` of a data set names.
"""

from typing import TYPE_CHECKING, Any

from axolotl_mopo.version import __version__

if TYPE_CHECKING:
    from axolotl_mopo.plugin import MOPOPlugin

__all__ = ["MOPOPlugin", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the plugin and the strategies on first use, so that importing the package is fast.

    A strategy's name may end in `@` and the key of its data set's settings; `axolotl_mopo.data.entries` adds them.
    """
    if name == "MOPOPlugin":
        from axolotl_mopo.plugin import MOPOPlugin

        return MOPOPlugin
    if name.startswith("_"):
        raise AttributeError(name)
    from axolotl_mopo.data.strategies import find_strategy

    return find_strategy(name)
