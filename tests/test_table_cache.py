"""Processes of one run wait for another run's table as long as it takes, and never within one collective."""

import multiprocessing
import os
import socket
import time
from datetime import timedelta

import torch
from filelock import FileLock

CONTEXT = multiprocessing.get_context("fork")
LIMIT = 3.0
"""Seconds that a collective of the ranks may take."""


def rank_of_two(rank, port, folder, answers):
    """Ask for a table as one of two ranks."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    from axolotl_mopo.margins.cache import TableCache

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
