"""Loads models that compute rewards, with all weights on every rank even if the policy is sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations import deepspeed as zero
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from axolotl_mopo.errors import ConfigError


@contextmanager
def readable_weights(path: str) -> Iterator[None]:
    """Context manager that turns errors of reading weights into a ConfigError.

    Args:
        path: folder or hub name of the model or adapter, for the message.

    Raises:
        ConfigError: if a file is broken or is a pickle of objects other than tensors.
    """
    try:
        yield
    except UnpicklingError:
        raise ConfigError(
            f"the weights of {path} cannot be opened safely: the file is broken, or is a pickle of objects other than "
            "tensors; use weights that were saved as safetensors by someone you trust, or another model"
        ) from None
    except SafetensorError as error:
        raise ConfigError(
            f"the weights of {path} cannot be read because a safetensors file is broken: {error}; download or save "
            "them again"
        ) from None


def language_model_class(path: str) -> Any:
    """Return the class that loads a language model as Axolotl does, a vision-language model as a whole.

    Args:
        path: a folder or a model of the hub.
    """
    vision = AutoConfig.from_pretrained(path).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def load_whole(kind: Any, path: str, dtype: torch.dtype, **kwargs: Any) -> Any:
    """Load a model with all weights on every rank. All ranks must call this.

    With `cpu_ram_efficient_loading` transformers would fill the weights with zeros on all ranks but the first, and with
    ZeRO-3 it would shard them. Both are meant for the policy, whose weights FSDP or DeepSpeed distributes later.

    Args:
        kind: a class with `from_pretrained`.
        path: a folder or a model of the hub.
        dtype: dtype of its parameters.
        kwargs: passed to `from_pretrained`.

    Raises:
        ConfigError: if its weights cannot be read.
    """
    with readable_weights(path), patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"), _shards_in_float32():
        model = kind.from_pretrained(path, dtype=dtype, **kwargs)
    return _gather(model, dtype)


@contextmanager
def _shards_in_float32() -> Iterator[None]:
    """Context manager in which ZeRO-3 keeps loaded weights in float32, even if the run trains in bf16.

    ZeRO-3 itself cannot be turned off here: Axolotl enables it in transformers for the whole process.
    """
    if not zero.is_deepspeed_zero3_enabled():
        yield
        return
    reference = zero._hf_deepspeed_config_weak_ref
    of_the_run = reference and reference()
    # transformers keeps only a weak reference to it, so it must be held here.
    own = zero.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        yield
    finally:
        del own
        if of_the_run is None:
            zero.unset_hf_deepspeed_config()
        else:
            zero.set_hf_deepspeed_config(of_the_run)


def _gather(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the parameters that ZeRO-3 has sharded by whole ones."""
    whole: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if hasattr(parameter, "ds_id"):
                if parameter not in whole:
                    whole[parameter] = _whole(parameter, dtype)
                setattr(module, name, whole[parameter])
    return model


def _whole(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter):
        return nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
