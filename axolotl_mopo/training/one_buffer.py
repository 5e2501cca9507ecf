"""A batch of many small tensors that moves between processes or to a device as a single tensor."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16


class OneBufferBatch(dict[str, Any]):
    """A nested batch whose tensors move to another process or device together, in one buffer.

    torch would use a file descriptor or a copy for every tensor, and a batch of several passes has dozens of tensors.
    """

    packed: "tuple[Tensor, dict[str, Any]] | None" = None
    """The buffer that the tensors are views of, and the batch with slots instead of tensors."""

    def __setitem__(self, key: str, value: Any) -> None:
        self.packed = None
        super().__setitem__(key, value)

    def __reduce__(self) -> Any:
        return _unpacked, self._pack()

    def pin_memory(self) -> "OneBufferBatch":
        """Return a copy in page-locked memory."""
        buffer, layout = self._pack()
        return _unpacked(buffer.pin_memory(), layout)

    def to(self, device: Any, non_blocking: bool = False) -> "OneBufferBatch":
        """Return a copy on a device."""
        buffer, layout = self._pack()
        return _unpacked(buffer.to(device, non_blocking=non_blocking), layout)

    def _pack(self) -> tuple[Tensor, dict[str, Any]]:
        return self.packed or _packed(self)


@dataclass(frozen=True)
class _Slot:
    """Position of a tensor in the buffer."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


def _packed(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return a buffer of bytes, and the batch with slots instead of tensors."""
    tensors: list[tuple[Tensor, _Slot]] = []
    end = 0

    def take(tensor: Tensor) -> _Slot:
        nonlocal end
        slot = _Slot(end, tensor.shape, tensor.dtype)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        tensors.append((tensor, slot))
        return slot

    layout = _replaced(dict(batch), Tensor, take)
    buffer = torch.empty(end, dtype=torch.uint8)
    for tensor, slot in tensors:
        slot.of(buffer).copy_(tensor)
    return buffer, layout


def _unpacked(buffer: Tensor, layout: dict[str, Any]) -> OneBufferBatch:
    batch = OneBufferBatch(_replaced(layout, _Slot, lambda slot: slot.of(buffer)))
    batch.packed = buffer, layout
    return batch


def _replaced(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Copy nested dicts, lists and dataclasses; replace every value of type `kind` by `function(value)`."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _replaced(part, kind, function) for key, part in value.items()}
    if isinstance(value, list):
        return [_replaced(part, kind, function) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **_replaced(parts, kind, function))
    return value
