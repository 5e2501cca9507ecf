"""Processes of one run wait for another run's table as long as it takes, and never within one collective."""

import math
import multiprocessing
import os
import socket
import time
from datetime import timedelta

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from axolotl_mopo.digests.weights import table_digest

CONTEXT = multiprocessing.get_context("fork")
LIMIT = 3.0
"""Seconds that a collective of the ranks may take."""


def rank_of_two(rank, port, folder, answers):
    """Ask for a table as one of two ranks."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    from axolotl_mopo.training.table_cache import TableCache

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    group = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=LIMIT))
    cache = TableCache(folder, Accelerator(cpu=True, kwargs_handlers=[group]))
    started = time.monotonic()
    table, found = cache.table("name", 2, lambda: torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    answers.put((rank, table.tolist(), found, time.monotonic() - started))


def test_ranks_outlast_another_runs_lock_that_is_held_longer_than_a_collective_may_take(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = CONTEXT.Queue()
    with FileLock(tmp_path / "name.lock"):
        ranks = [CONTEXT.Process(target=rank_of_two, args=(rank, port, tmp_path, answers)) for rank in range(2)]
        for process in ranks:
            process.start()
        time.sleep(2.5 * LIMIT)
        assert all(process.is_alive() for process in ranks)
    given = sorted(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert [answer[:3] for answer in given] == [(rank, [[1.0, 2.0], [3.0, 4.0]], False) for rank in range(2)]
    assert min(waited for *_, waited in given) > LIMIT


@pytest.fixture
def table(tmp_path):
    """A function that asks a cache for a table, and the table's file, which is there."""
    from accelerate import Accelerator

    from axolotl_mopo.training.table_cache import TableCache

    cache = TableCache(tmp_path, Accelerator(cpu=True))

    def asked(name="name"):
        values, found = cache.table(name, 2, lambda: torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        assert values.tolist() == [[1, 2], [3, 4]]
        return found

    assert not asked()
    assert asked()
    return asked, cache.path("name")


PLANTED = {"values": torch.full((2, 2), 7.0)}


def test_a_planted_table_is_computed_again_with_a_warning(table, host_log):
    asked, path = table
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(PLANTED, path, metadata)
    assert not asked()
    assert "does not match its recorded digest; the table is computed again" in host_log.text
    assert asked()


def test_a_table_under_another_name_is_computed_again(table, host_log):
    asked, path = table
    path.rename(path.with_name("other.safetensors"))
    assert not asked("other")
    assert "does not match its recorded digest" in host_log.text


@pytest.mark.parametrize("break_", ["no digest", "no metadata", "no values", "not finite", "cut", "a link", "a pipe"])
def test_a_table_that_cannot_be_used_is_computed_again(table, break_, tmp_path):
    asked, path = table
    if break_ == "no digest":
        save_file(PLANTED, path)
    elif break_ == "no metadata":
        header = b'{"__metadata__":null,"values":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    elif break_ == "no values":
        save_file({"other": PLANTED["values"]}, path)
    elif break_ == "not finite":
        values = torch.tensor([[1.0, 2.0], [math.nan, 4.0]])
        save_file({"values": values}, path, {"sha256": table_digest("name", values)})
    elif break_ == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif break_ == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.unlink()
        os.mkfifo(path)
    assert not asked()
    assert asked()
