"""Names made of content, so that what was computed from it can be found again, and only then."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from axolotl_mopo.data.content import TOKENIZER_FILES, files_digest

_BATCH = 1000
_CHUNK = 1 << 22


def digest(content: Any) -> str:
    """A name made of JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def rows_digest(rows: Dataset, columns: Sequence[str]) -> str:
    """A name made of the values of some columns, in the order of the rows, however Arrow holds them.

    Args:
        rows: in any number of shards, slices and selections.
        columns: of integers, strings, or lists of them.
    """
    hasher = hashlib.sha256(f"{len(rows)} {list(columns)}".encode())
    for batch in rows.select_columns(list(columns)).with_format("arrow").iter(_BATCH):
        for name in columns:
            for part in _canonical_parts(batch[name].combine_chunks()):
                hasher.update(part.tobytes())
    return hasher.hexdigest()[:32]


def _canonical_parts(values: pa.Array) -> Iterator[NDArray[Any]]:
    """Arrays whose bytes tell values apart, and depend on nothing else: lengths, -1 for null, then what is in them.

    Arrow's own buffers also hold padding, offsets that a slice does not begin at 0, and bytes below nulls.

    Raises:
        TypeError: where values are of another type.
    """
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield _lengths(pc.list_value_length(values))
        yield from _canonical_parts(values.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield _lengths(pc.binary_length(values))
        texts = values.cast(pa.string()).drop_null()
        joined = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), "")
        yield np.frombuffer(joined[0].as_buffer(), np.uint8)
    elif pa.types.is_integer(kind) or pa.types.is_null(kind):
        yield values.is_valid().to_numpy(zero_copy_only=False)
        yield values.cast(pa.int64()).drop_null().to_numpy()
    else:
        raise TypeError(f"values of type {kind} have no digest")


def _lengths(lengths: pa.Array) -> NDArray[np.int64]:
    return lengths.cast(pa.int64()).fill_null(-1).to_numpy()


def weights_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A name made of weights: of each tensor's name, shape, type and bits, which never leave their device."""
    hasher = hashlib.sha256()
    sums, described = [], []
    for name, parameter in parameters:
        described.append(f"{name} {tuple(parameter.shape)} {parameter.dtype}")
        sums.append(_bits_sum(parameter.detach()))
    for text, value in zip(described, torch.stack(sums).tolist(), strict=True):
        hasher.update(f"{text} {value}\n".encode())
    return hasher.hexdigest()[:32]


def policy_digests(model: nn.Module) -> tuple[str, str]:
    """Names of the base model's weights, and of the weights of the model with its adapters.

    The two are the same where there are no adapters, or adapters that change nothing yet.
    """
    if not isinstance(model, PeftModel):
        base = weights_digest(model.named_parameters())
        return base, base
    parameters = [(name.split("."), parameter) for name, parameter in model.get_base_model().named_parameters()]
    names = set(model.peft_config)
    adapters = [(".".join(parts), parameter) for parts, parameter in parameters if names & set(parts)]
    own = [part for part in parameters if not names & set(part[0])]
    base = weights_digest((".".join(p for p in parts if p not in _WRAPPERS), parameter) for parts, parameter in own)
    return base, base if _is_neutral(adapters) else digest([base, weights_digest(adapters)])


def _is_neutral(adapters: Sequence[tuple[str, Tensor]]) -> bool:
    """Whether LoRA's second factors are all zero, as before any training, whatever the random first ones are."""
    if any("lora_A" not in name and "lora_B" not in name for name, _ in adapters):
        return False
    return not any(_local(parameter).any() for name, parameter in adapters if "lora_B" in name)


def model_files_digest(folder: Path) -> str:
    """A name made of the weights, the configs and the tokenizer in a model's folder."""
    return files_digest(path for path in folder.iterdir() if _is_of_model(path))


def _is_of_model(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin") or path.name in _CONFIGS or path.name.startswith(TOKENIZER_FILES)


def _bits_sum(tensor: Tensor) -> Tensor:
    """A 64-bit sum over all elements' bits, each mixed with its position."""
    bits = _local(tensor).contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        values = bits[start : start + _CHUNK].to(torch.int64)
        values = (values + torch.arange(start, start + values.numel(), device=values.device)) * 0x2545F4914F6CDD1D
        values = (values ^ (values >> 29)) * 0x1B03738712FAD5C9
        total += (values ^ (values >> 32)).sum()
    return total.cpu()


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, under FSDP and ZeRO-3."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_CONFIGS = ("config.json", "adapter_config.json")
_WRAPPERS = {"base_layer", "original_module"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
