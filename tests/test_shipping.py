"""What a data-loader worker sends of a batch: the same batch, by one file descriptor."""

import io
import multiprocessing
import os
import pickle
import resource
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import ragged_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from axolotl_mopo.training.collator import PairCollator
from axolotl_mopo.training.one_buffer import OneBufferBatch

ROWS = [
    {
        "prompt_input_ids": pair.prompts,
        "chosen_input_ids": pair.chosen,
        "rejected_input_ids": pair.rejected,
        "pair_index": number,
    }
    for number, pair in enumerate(ragged_pairs() * 4)
]
LAYOUTS = {"packed": {}, "padded": {"packed": False}, "many passes": {"max_tokens": 30}}


def tensors(value):
    """All tensors of a nested batch, by where they are."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if hasattr(value, "__dataclass_fields__"):
        parts = vars(value).items()
    return {f"{key}.{name}": tensor for key, part in parts for name, tensor in tensors(part).items()}


def rest(value):
    """Everything else."""
    if isinstance(value, dict):
        return {key: rest(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rest(part) for part in value]
    if hasattr(value, "__dataclass_fields__"):
        return type(value), rest(vars(value))
    return type(value) if isinstance(value, torch.Tensor) else value


def assert_same(one, other):
    assert rest(one) == rest(other)
    expected = tensors(other)
    for name, tensor in tensors(one).items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_worker_sends_the_batch_that_the_collator_makes(layout):
    collator = PairCollator(0, **LAYOUTS[layout])
    loader = DataLoader(ROWS, batch_size=6, collate_fn=collator, num_workers=1, multiprocessing_context="fork")
    for number, batch in enumerate(loader):
        assert isinstance(batch, OneBufferBatch)
        assert_same(batch, collator(ROWS[6 * number : 6 * number + 6]))


def read_with_few_descriptors(collator):
    """Let a worker make many batches before the first is read; the process's exit tells whether that went well."""
    spare = 40
    open_now = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + spare, open_now + spare))
    loader = DataLoader(ROWS * 6, batch_size=6, collate_fn=collator, num_workers=1, prefetch_factor=12)
    kept = list(loader)
    os._exit(0 if len(kept) == 12 else 1)


def test_a_batch_of_many_passes_takes_one_file_descriptor():
    collator = PairCollator(0, max_tokens=30)
    assert len(tensors(collator(ROWS[:6]))) > 40
    child = multiprocessing.get_context("fork").Process(target=read_with_few_descriptors, args=(collator,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_what_is_sent_is_one_buffer():
    sent = Counter()

    class Counting(ForkingPickler):
        def reducer_override(self, value):
            sent[type(value)] += isinstance(value, torch.Tensor)
            return NotImplemented

    Counting(io.BytesIO()).dump(PairCollator(0, max_tokens=30)(ROWS[:6]))
    assert sent.total() == 1


def test_a_batch_is_pinned_as_one_buffer(monkeypatch):
    pinned = []

    def stand_in_for_page_locked_memory(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", stand_in_for_page_locked_memory)
    batch = PairCollator(0, max_tokens=30)(ROWS[:6])
    assert_same(pin_memory(batch), batch)
    assert len(pinned) == 1


def test_a_batch_goes_to_a_device_in_one_copy_as_accelerate_sends_it():
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default
            return function(*args, **(kwargs or {}))

    batch = PairCollator(0, max_tokens=30)(ROWS[:6])
    for source in (batch, pickle.loads(ForkingPickler.dumps(batch))):  # made here, or by a worker
        with Copies() as copies:
            sent = send_to_device(source, torch.device("meta"), non_blocking=True)
        assert copies.count == 1
        assert {tensor.device.type for tensor in tensors(sent).values()} == {"meta"}
        assert {name: tensor.shape for name, tensor in tensors(sent).items()} == {
            name: tensor.shape for name, tensor in tensors(batch).items()
        }
