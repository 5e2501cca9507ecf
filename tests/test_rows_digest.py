"""One set of rows has one digest, whatever Arrow made of it, and another set has another."""

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mopo.digests.rows import rows_digest

TYPES = {"ids": pa.list_(pa.list_(pa.int32())), "flat": pa.list_(pa.int32()), "text": pa.string()}
WIDE = {
    "ids": pa.large_list(pa.list_(pa.int64())),
    "flat": pa.large_list(pa.int64()),
    "text": pa.large_string(),
}
tokens = st.lists(st.integers(0, 3), max_size=3)
values = st.fixed_dictionaries(
    {"ids": st.lists(tokens, max_size=3), "flat": st.none() | tokens, "text": st.none() | st.text("aä", max_size=2)}
)


def table(rows, types=TYPES):
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})


def digest(rows):
    return rows_digest(rows, list(TYPES))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(values, min_size=1, max_size=9), data=st.data())
def test_equal_values_have_one_digest_whatever_their_shards_slices_and_selections(rows, data):
    plain = Dataset(table(rows))
    expected = digest(plain)
    before, cut = data.draw(st.integers(0, len(rows))), data.draw(st.integers(0, len(rows)))
    padded = table([*rows[:before], *rows, *rows[:2]])
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = Dataset(table([rows[index] for index in order]))
    chunks = pa.concat_tables([table(rows[:cut]), table(rows[cut:])])
    same = {
        "a slice": Dataset(padded.slice(before, len(rows))),
        "a selection of neighbours": Dataset(padded).select(range(before, before + len(rows))),
        "a selection": shuffled.select([order.index(index) for index in range(len(rows))]),
        "shards": concatenate_datasets([Dataset(table(rows[:cut])), Dataset(table(rows[cut:]))]),
        "chunks": Dataset(chunks),
        "wide types": Dataset(table(rows, WIDE)),
    }
    assert {name: digest(rows) for name, rows in same.items()} == dict.fromkeys(same, expected)


@settings(max_examples=50, deadline=None)
@given(first=st.lists(values, max_size=3), second=st.lists(values, max_size=3))
def test_different_values_have_different_digests(first, second):
    assert (digest(Dataset(table(first))) == digest(Dataset(table(second)))) is (first == second)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("ids", [[[1], [2, 3]]], [[[1, 2], [3]]]),
        ("ids", [[[1, 2]], [[3]]], [[[1]], [[2, 3]]]),
        ("ids", [[[]]], [[]]),
        ("flat", [None], [[]]),
        ("flat", [[0]], [[]]),
        ("text", [None], [""]),
        ("text", ["ab", "c"], ["a", "bc"]),
    ],
)
def test_boundaries_and_nulls_count(name, first, second):
    one, other = (Dataset(pa.table({name: pa.array(rows, TYPES[name])})) for rows in (first, second))
    assert rows_digest(one, [name]) != rows_digest(other, [name])


def test_names_and_their_order_count():
    rows = Dataset.from_dict({"a": [[1]], "b": [[2]]})
    swapped = rows.rename_columns({"a": "b", "b": "a"})
    assert len({rows_digest(each, ["a", "b"]) for each in (rows, swapped)} | {rows_digest(rows, ["a"])}) == 3


def test_more_rows_than_one_batch_have_one_digest(tmp_path):
    features = Features({"flat": List(Value("int32"))})
    rows = Dataset.from_dict({"flat": [[index] * (index % 3) for index in range(2500)]}, features)
    rows.save_to_disk(tmp_path, num_shards=3)
    loaded = datasets.load_from_disk(tmp_path)
    halves = rows.train_test_split(0.3, shuffle=False)
    expected = rows_digest(rows, ["flat"])
    assert rows_digest(loaded, ["flat"]) == expected
    assert rows_digest(concatenate_datasets(list(halves.values())), ["flat"]) == expected
    assert rows_digest(rows.select([*range(2499), 1]), ["flat"]) != expected
    assert rows_digest(loaded.select(range(1750)), ["flat"]) == rows_digest(halves["train"], ["flat"])
