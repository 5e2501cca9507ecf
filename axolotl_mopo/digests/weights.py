"""Digests of tensors and of models in memory."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from axolotl_mopo.digests import digest

_CHUNK = 1 << 22


def table_digest(name: str, values: Tensor) -> str:
    """A digest of the name, type, shape and values of a table."""
    head = f"{name} {values.dtype} {list(values.shape)}\n".encode()
    return hashlib.sha256(head + values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of all tensors; see `tensor_digests`."""
    return digest(list(tensor_digests(tensors).items()))


def tensor_digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A digest of each tensor: its full shape, its type and a sum of its bits, which is computed on its device.

    For a sharded tensor, the sum covers the shard of this process. Quantized weights include their quantization state.
    """
    named = [part for name, tensor in tensors for part in _with_scales(name, tensor)]
    sums = torch.stack([_bits_sum(tensor) for _, tensor in named]).tolist() if named else []
    return {
        name: f"{tuple(getattr(tensor, 'ds_shape', tensor.shape))} {tensor.dtype} {total}"
        for (name, tensor), total in zip(named, sums, strict=True)
    }


def _with_scales(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, and the state that bitsandbytes keeps for a tensor of 4 or 8 bits."""
    yield name, tensor
    if (state := getattr(tensor, "quant_state", None)) is not None:
        yield from ((f"{name}.{part}", value) for part, value in state.as_dict(packed=True).items())
    if (scales := getattr(tensor, "SCB", None)) is not None:
        yield f"{name}.SCB", scales


def policy_digests(model: nn.Module) -> tuple[str, str]:
    """Digests of the base model and of the model with its adapters, of weights, buffers and settings.

    The two are equal if there are no adapters, or if the adapters do not change the model yet.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted = set(model.peft_config) if isinstance(model, PeftModel) else set()
    tensors = [(name.split("."), tensor) for name, tensor in [*base.named_parameters(), *base.named_buffers()]]
    adapters = [(".".join(parts), tensor) for parts, tensor in tensors if adapted & set(parts)]
    own = [(_outside_wrappers(parts), tensor) for parts, tensor in tensors if not adapted & set(parts)]
    of_base = digest([weights_digest(own), _settings(base.config.to_dict(), _CHANGE_NO_LOGITS)])
    if not isinstance(model, PeftModel) or _is_neutral(adapters):
        return of_base, of_base
    return of_base, digest([of_base, weights_digest(adapters), _adapter_settings(model)])


def _outside_wrappers(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if part not in PEFT_WRAPPERS)


def _is_neutral(adapters: Sequence[tuple[str, Tensor]]) -> bool:
    """Whether all LoRA B matrices are zero, as before training; the random A matrices have no effect then."""
    if any("lora_A" not in name and "lora_B" not in name for name, _ in adapters):
        return False
    return not any(_local(parameter).any() for name, parameter in adapters if "lora_B" in name)


def _settings(content: Any, without: Set[str]) -> Any:
    """A configuration without private keys and the keys in `without`, on every level."""
    match content:
        case Mapping():
            kept = [key for key in content if not str(key).startswith("_") and key not in without]
            return {str(key): _settings(content[key], without) for key in kept}
        case set() | frozenset():
            return sorted(map(str, content))
        case list() | tuple():
            return [_settings(part, without) for part in content]
        case None | bool() | int() | float():
            return content
        case _:
            return str(content)


def _adapter_settings(model: PeftModel) -> Any:
    """Settings that make adapters with equal weights differ, above all their scaling."""
    configs = {name: _settings(config.to_dict(), _CHANGE_NO_ADAPTER) for name, config in model.peft_config.items()}
    scaling = {name: module.scaling for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return [configs, _settings(scaling, frozenset())]


def _bits_sum(tensor: Tensor) -> Tensor:
    """A 64-bit sum over the bits of all elements, each mixed with its position."""
    bits = _local(tensor).contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        values = bits[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start, start + values.numel(), device=values.device)
        total += _mixed(values ^ _mixed(positions)).sum()
    return total.cpu()


def _mixed(values: Tensor) -> Tensor:
    """Scatter integers over 64 bits; different integers stay different."""
    values = (values ^ (values >> 32)) * 0x2545F4914F6CDD1D
    values = (values ^ (values >> 29)) * 0x1B03738712FAD5C9
    return values ^ (values >> 32)


def _local(tensor: Tensor) -> Tensor:
    """The shard of a tensor in this process, under FSDP and ZeRO-3."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


PEFT_WRAPPERS = frozenset({"base_layer", "modules_to_save", "original_module", "token_adapter"})
"""Parts that PEFT adds to the names of the base model's tensors."""
_CHANGE_NO_LOGITS = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"})
"""Keys of a model's configuration that do not change its logits; the digests of the weights cover their types."""
_CHANGE_NO_ADAPTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Keys of an adapter's configuration about its origin and training, which do not change its outputs."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
