"""Numbers beside selected rows, without a copy of the rows; and folders that no process holds any more."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from axolotl_mopo.data.conversations import user
from axolotl_mopo.data.pair_store import PairStore
from axolotl_mopo.data.rows import PreferencePair, RatedResponse
from axolotl_mopo.training.prepared_rows import numbers, pair_lengths, with_lengths, with_numbers

ROWS = Dataset.from_dict(
    {
        "prompt_input_ids": [[[1] * (1 + index)] for index in range(20)],
        "chosen_input_ids": [[2] * (1 + index % 3) for index in range(20)],
        "rejected_input_ids": [[3]] * 20,
        "prompt_key": list(range(100, 120)),
    }
)
SELECTIONS = {
    "all": ROWS,
    "shuffled": ROWS.shuffle(seed=3),
    "some": ROWS.select([7, 3, 11]),
    "a part of a shuffle": ROWS.shuffle(seed=3).select(range(4, 9)),
    "a split": ROWS.train_test_split(0.3, seed=1)["train"],
    "a slice": ROWS.select(range(5, 12)),
    "neighbours, in their order again": ROWS.select([6, 5]).select([1, 0]),
    "some twice": ROWS.select([4, 4, 9]),
    "one of some": ROWS.select([7, 3, 11]).select([1]),
    "neighbours among some": ROWS.select([9, 4, 5, 6]).select([1, 2, 3]),
    "none": ROWS.select([]),
}


@pytest.mark.parametrize("held_out", [[7], [7, 8], [7, 3]])
def test_rows_of_a_file_get_numbers_even_where_neighbours_alone_are_selected(held_out, tmp_path):
    ROWS.save_to_disk(tmp_path)
    shuffled = load_from_disk(tmp_path).shuffle(seed=3)
    places = [shuffled["prompt_key"][:].index(100 + row) for row in held_out]
    rows = with_numbers(shuffled.select(places), "number", np.arange(len(held_out)))
    assert rows["prompt_key"][:] == [100 + row for row in held_out]
    assert rows["number"][:] == list(range(len(held_out)))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_get_their_own_numbers_whatever_was_selected_of_them(selection):
    rows = SELECTIONS[selection]
    values = np.arange(50, 50 + len(rows))
    made = with_lengths(with_numbers(rows, "pair_index", values))
    assert made["pair_index"][:] == numbers(made, "pair_index").tolist() == values.tolist()
    assert made["length"][:] == pair_lengths(rows).tolist() == pair_lengths(rows.flatten_indices()).tolist()
    assert numbers(rows, "prompt_key").tolist() == rows["prompt_key"][:]
    assert made.remove_columns(["pair_index", "length"]).to_list() == rows.to_list()
    if len(rows):
        last = len(rows) - 1
        assert (
            made.select([last])[0]
            == made[last]
            == {**rows[last], "pair_index": 50 + last, "length": made["length"][last]}
        )


def test_a_selection_is_not_copied():
    rows = ROWS.shuffle(seed=3)
    made = with_numbers(rows, "pair_index", np.arange(20))
    address = rows.data.column("prompt_key").chunk(0).buffers()[1].address
    assert made.data.column("prompt_key").chunk(0).buffers()[1].address == address


PAIR = PreferencePair(user("Why?"), RatedResponse("So.", {}), RatedResponse("No.", {}))


def hold(folder, held):
    PairStore.write(iter([(0, PAIR)]), folder)
    held.set()
    time.sleep(600)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path):
    context = multiprocessing.get_context("fork")
    processes, folders = [], []
    for _ in range(2):
        held = context.Event()
        processes.append(context.Process(target=hold, args=(tmp_path, held)))
        processes[-1].start()
        assert held.wait(30)
        folders.append(next(path for path in tmp_path.glob("pairs-*") if path not in folders))
    killed, living = processes
    try:
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        store = PairStore.write(iter([(3, PAIR)]), tmp_path)
        assert not folders[0].exists()
        assert folders[1].exists()
        assert PairStore(folders[1] / "pairs.arrow").between(0, 0) == [(0, PAIR)]
        assert store.between(3, 3) == [(3, PAIR)]
        assert set(tmp_path.iterdir()) == {folders[1], store.path.parent}
    finally:
        living.kill()
        living.join()
