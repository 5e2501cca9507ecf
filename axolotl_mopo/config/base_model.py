"""Check by its `config.json` that the base model is a language model."""

from collections.abc import Mapping
from typing import Any

from axolotl_mopo.errors import ConfigError


def check_base_model(cfg: Mapping[str, Any]) -> None:
    """Refuse a base model that cannot be trained on texts alone, such as an encoder-decoder or a speech recogniser.

    A config that cannot be read, or whose model needs its own code, is left to Axolotl.

    Raises:
        ConfigError: if the model is an encoder-decoder, or Axolotl has no way to load it as a language model.
    """
    from transformers import PreTrainedConfig

    source = cfg.get("base_model_config") or cfg.get("base_model")
    if not isinstance(source, str) or cfg.get("type_of_model") or cfg.get("cls_model_config"):
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=cfg.get("revision_of_model"))
    except (OSError, ValueError):
        return
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        reason = "which is an encoder-decoder"
    elif isinstance(kind, str) and not config.get("auto_map") and not _is_language_model(kind):
        reason = "which Axolotl cannot load as a language model"
    else:
        return
    raise ConfigError(
        f"`base_model`: {source} is a model of the type {kind!r}, {reason}; choose a model that continues a text, such "
        "as a text-only or a vision-language decoder"
    )


def _is_language_model(kind: str) -> bool:
    """Whether Axolotl loads this `model_type` as a language model; True if transformers does not know the type."""
    from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING
    from axolotl.model_support import get_model_support
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in MULTIMODAL_AUTO_MODEL_MAPPING
    return known or kind not in CONFIG_MAPPING_NAMES or get_model_support(kind) is not None
