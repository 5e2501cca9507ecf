"""A package that gives axolotl_mopo a data set, a source of rewards and a method.

plugins: [axolotl_mopo.MOPOPlugin, extension.ExtensionPlugin]
"""

from axolotl.integrations.base import BasePlugin

from extension import data, margin, method

__all__ = ["ExtensionPlugin", "data", "margin", "method"]


class ExtensionPlugin(BasePlugin):
    """Axolotl imports what `plugins:` names, and so the three modules, each of which adds to one table."""

    def get_input_args(self):
        """The blocks of new methods, for Axolotl's schema; data sets and sources need no such thing."""
        return "extension.method.ExtensionArgs"
