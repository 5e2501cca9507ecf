"""Schema and validation of the YAML blocks of the methods. Imports nothing heavy."""

from axolotl_mopo.config.directives import INTEGRATED, Directives, PromptSettings
from axolotl_mopo.config.host_keys import attention_advice, check_skipping, checkpoint_advice
from axolotl_mopo.config.methods import (
    METHODS,
    AMoPOConfig,
    DimensionsConfig,
    MarginColumns,
    MethodConfig,
    MODPOConfig,
    MOPOArgs,
    RowSettings,
)
from axolotl_mopo.config.settings import Number, Settings, parse_settings
from axolotl_mopo.config.sources import SOURCES, Margin, Responses, RewardSource
from axolotl_mopo.config.validation import fold_dotted_keys, no_stray_block, read_method
from axolotl_mopo.errors import ConfigError

__all__ = [
    "INTEGRATED",
    "METHODS",
    "SOURCES",
    "AMoPOConfig",
    "ConfigError",
    "DimensionsConfig",
    "Directives",
    "MODPOConfig",
    "MOPOArgs",
    "Margin",
    "MarginColumns",
    "MethodConfig",
    "Number",
    "PromptSettings",
    "Responses",
    "RewardSource",
    "RowSettings",
    "Settings",
    "attention_advice",
    "check_skipping",
    "checkpoint_advice",
    "fold_dotted_keys",
    "no_stray_block",
    "parse_settings",
    "read_method",
]
