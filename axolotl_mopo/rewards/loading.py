"""Loads the models that rewards come from with all of their weights on every rank, however the policy is sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.integrations import deepspeed as zero

from axolotl_mopo.errors import ConfigError


@contextmanager
def readable_weights(path: str) -> Iterator[None]:
    """Explain why the weights of a model or an adapter cannot be read.

    Args:
        path: its folder, or its name on the model hub.

    Raises:
        ConfigError: where they are a pickle of something else than tensors, or a broken file.
    """
    try:
        yield
    except UnpicklingError:
        raise ConfigError(
            f"the weights of {path} cannot be opened safely: they are a pickle that holds something else than tensors, "
            "or a broken file; have them saved as safetensors by whom you trust, or choose another model"
        ) from None
    except SafetensorError as error:
        raise ConfigError(
            f"the weights of {path} cannot be read, since a safetensors file is broken: {error}; download or save them "
            "again"
        ) from None


def load_whole(kind: Any, path: str, dtype: torch.dtype, **kwargs: Any) -> Any:
    """Load a model that every rank holds as a whole; all ranks load it together.

    Under `cpu_ram_efficient_loading` transformers gives zeros to all ranks but the first, and under ZeRO-3 it shards
    what it loads: both are meant for the policy, whose weights FSDP and DeepSpeed distribute later.

    Args:
        kind: a class with `from_pretrained`.
        path: a folder or a model of the hub.
        dtype: of its parameters.
        kwargs: for `from_pretrained`.

    Raises:
        ConfigError: where its weights cannot be read.
    """
    with readable_weights(path), patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"), _shards_in_float32():
        model = kind.from_pretrained(path, dtype=dtype, **kwargs)
    return _gather(model, dtype)


@contextmanager
def _shards_in_float32() -> Iterator[None]:
    """Let ZeRO-3 round nothing of what is loaded, although the run's own settings may say bf16.

    It cannot be turned off: Axolotl tells transformers for good that ZeRO-3 is on.
    """
    if not zero.is_deepspeed_zero3_enabled():
        yield
        return
    reference = zero._hf_deepspeed_config_weak_ref
    of_the_run = reference and reference()
    # transformers refers to it weakly, so it must live until the end.
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
    """Put whole parameters into the place of those that ZeRO-3 has sharded."""
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
