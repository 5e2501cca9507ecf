"""Names made of content, so that what was computed from it can be found again, and only then."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
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
    """A name made of the values of some columns, in the order of the rows."""
    hasher = hashlib.sha256()
    for batch in rows.select_columns(list(columns)).with_format("arrow").iter(_BATCH):
        sink = pa.BufferOutputStream()
        # Plain columns, without the schema's metadata, which says nothing of the values.
        table = pa.table({name: batch[name] for name in columns}).combine_chunks()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        hasher.update(sink.getvalue())
    return hasher.hexdigest()[:32]


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
