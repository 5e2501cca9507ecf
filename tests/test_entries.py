"""Data-set entries: what orders the pairs, which scores they have, and what Axolotl would silently ignore."""

import copy

import pytest
from test_config import AMOPO, MODPO, changed, refusal

from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.plugin import MOPOPlugin


def spec(base, **entry):
    cfg = copy.deepcopy(base)
    cfg["datasets"] = [{"path": "data.jsonl", **entry}]
    MOPOPlugin().register(cfg)
    (value,) = cfg["mopo_data"].values()
    assert set(cfg["datasets"][0]) <= {"path", "type", "split", "data_files"}  # Axolotl's schema would drop our keys
    return DataSpec.model_validate(value)


HELPFUL = changed(MODPO, modpo={"objective": "helpfulness", "weights": {"helpfulness": 1}})
BETTER = changed(MODPO, modpo={"objective": "better", "weights": {"better": 1}})


@pytest.mark.parametrize(
    ("base", "entry", "objective"),
    [
        (HELPFUL, {"type": "axolotl_mopo.helpsteer"}, ("helpfulness",)),
        (HELPFUL, {"type": "axolotl_mopo.ultrafeedback", "objective": ["honesty", "overall"]}, ("honesty", "overall")),
        (AMOPO, {"type": "axolotl_mopo.helpsteer2"}, ("helpfulness", "correctness")),
        (AMOPO, {"type": "axolotl_mopo.helpsteer2", "objective": "overall"}, ("overall",)),
        (BETTER, {"type": "axolotl_mopo.helpsteer2"}, ()),  # its preference part
        (BETTER, {"type": "axolotl_mopo.safe_rlhf"}, ("better",)),
        (HELPFUL, {"type": "axolotl_mopo.safe_rlhf", "objective": "safer"}, ("safer",)),
        (AMOPO, {"type": "axolotl_mopo.pairs"}, ()),
    ],
)
def test_what_orders_the_pairs(base, entry, objective):
    assert spec(base, **entry).objective == objective


def test_scales_are_the_data_sets_own_unless_the_entry_says_another():
    settings = {"dimensions": ["honesty", "overall"], "score_range": [0, 100]}
    base = changed(AMOPO, amopo=settings)
    assert spec(base, type="axolotl_mopo.ultrafeedback").scales == {"honesty": (1, 5), "overall": (1, 10)}
    assert spec(base, type="axolotl_mopo.ultrafeedback", score_scale=[0, 9]).scales["honesty"] == (0, 9)
    assert spec(base, type="axolotl_mopo.pairs").scales == {"honesty": (0, 100), "overall": (0, 100)}


def test_the_seed_counts_only_where_it_decides():
    def key(seed, **entry):
        return spec({**AMOPO, "seed": seed}, type="axolotl_mopo.pairs", **entry).key

    assert key(1) == key(2)
    assert key(1, max_pairs_per_prompt=3) != key(2, max_pairs_per_prompt=3)
    assert key(None, max_pairs_per_prompt=3) == key(42, max_pairs_per_prompt=3)


def test_files_count_by_their_content_and_not_by_their_path(tmp_path):
    data, tokenizer = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    tokenizer.mkdir()

    def key(**entry):
        return spec({**AMOPO, "base_model": str(tokenizer)}, type="axolotl_mopo.pairs", **entry).key

    ways = [
        {"path": str(data / "a.jsonl")},
        {"path": str(data)},
        {"path": "json", "data_files": [str(data / "a.jsonl")]},
    ]
    keys = [[key(**way) for way in ways]]
    for file, content in (
        (data / "a.jsonl", '{"a": 1}'),
        (data / "a.jsonl", '{"a": 2}'),
        (tokenizer / "tokenizer.json", "{}"),
        (tokenizer / "chat_template.jinja", "{{ messages }}"),
    ):
        file.write_text(content)
        keys.append([key(**way) for way in ways])
        file.touch()
        assert [key(**way) for way in ways] == keys[-1]
    assert all(len(set(column)) == len(keys) for column in zip(*keys, strict=True))


def test_every_option_that_changes_the_rows_changes_their_name():
    def keys(kind, base, *options):
        return [spec(base, type=f"axolotl_mopo.{kind}", **each).key for each in ({}, *options)]

    nice = {"objective": "nice"}
    for names in (
        keys("pairs", AMOPO, {"field_system": "s"}, {"where": {"a": 1}}, {"where": {"a": 2}}, {"where": {"b": 1}}),
        keys("responses", HELPFUL, {**nice, "keep_unfinished": True}, nice),
        keys("shp", HELPFUL, {"min_score_ratio": 2}, {"min_score_ratio": 3}),
        keys("helpsteer2", HELPFUL, {"ratings": "a"}, {"ratings": "a", "ratings_split": "b"}),
    ):
        assert len(set(names)) == len(names)


def test_rows_that_another_version_has_read_have_another_name():
    read = spec(AMOPO, type="axolotl_mopo.pairs")
    assert read.model_copy(update={"reading_version": read.reading_version - 1}).key != read.key


def test_the_content_of_ratings_and_of_files_behind_a_pattern_counts(tmp_path):
    ratings, data = tmp_path / "ratings.jsonl", tmp_path / "data.jsonl"
    entries = [
        {"type": "axolotl_mopo.helpsteer2", "ratings": str(ratings)},
        {"type": "axolotl_mopo.pairs", "path": "json", "data_files": str(tmp_path / "d*.jsonl")},
    ]
    keys = []
    for content in ('{"a": 1}', '{"a": 2}'):
        for file in (ratings, data):
            file.write_text(content)
        keys.append([spec(AMOPO, **entry).key for entry in entries])
    assert not set(keys[0]) & set(keys[1])
    ratings.write_text("")
    assert f"`datasets[0]`: {ratings} is empty" in refusal(changed(AMOPO, datasets=[{"path": "x", **entries[0]}]))


def test_rows_of_another_value_are_named_by_a_scalar():
    where = {"split": "train", "n": 1, "x": 0.5, "ok": True}
    assert spec(AMOPO, type="axolotl_mopo.pairs", where=where).options.where == where


@pytest.mark.parametrize(
    ("base", "entry", "words"),
    [
        (
            BETTER,
            {"type": "axolotl_mopo.helpsteer"},
            [
                "`datasets[0].objective` is missing, and `modpo.objective` cannot be used",
                "better cannot order the pairs",
            ],
        ),
        (
            changed(AMOPO, amopo__dimensions=["better", "safer"]),
            {"type": "axolotl_mopo.safe_rlhf"},
            ["`datasets[0].objective` is missing, and `amopo.dimensions`", "name one of better, safer"],
        ),
        (
            HELPFUL,
            {"type": "axolotl_mopo.helpsteer", "objective": ["helpfulness", "beauty"]},
            ["`datasets[0].objective`: beauty cannot order the pairs; choose from helpfulness, correctness,"],
        ),
        (BETTER, {"type": "axolotl_mopo.safe_rlhf", "objective": ["better", "safer"]}, ["name one of better, safer"]),
        (HELPFUL, {"type": "axolotl_mopo.helpsteer", "objective": []}, ["the list is empty; name at least one score"]),
        (HELPFUL, {"type": "axolotl_mopo.pairs", "objective": "x"}, ["`datasets[0].objective` is not a known key"]),
        (
            AMOPO,
            {"type": "axolotl_mopo.ultrafeedback"},
            ["`amopo.dimensions` needs a score of correctness from `datasets[0]`, but ultrafeedback has", "honesty"],
        ),
        (AMOPO, {"type": "axolotl_mopo.hh_rlhf"}, ["`amopo.dimensions` needs", "hh_rlhf has no scores"]),
        (MODPO, {"type": "axolotl_mopo.shp"}, ["`modpo.margins` needs a score of safer", "shp has no scores"]),
        (
            changed(AMOPO, amopo__dimensions=["severity_level", "safe"]),
            {"type": "axolotl_mopo.safe_rlhf", "objective": "safer"},
            ["`amopo.dimensions` has severity_level, for which higher is worse in `datasets[0]`"],
        ),
        (
            AMOPO,
            {"type": "axolotl_mopo.pairs", "on_bad_row": "skip"},
            ["`datasets[0].on_bad_row`", "'raise' or"],
        ),
        (AMOPO, {"type": "axolotl_mopo.pairs", "max_pairs_per_prompt": 0}, ["`datasets[0].max_pairs_per_prompt`"]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "max_pairs_per_prompt": "2"}, ["`datasets[0].max_pairs_per_prompt`"]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "where": {}}, ["`datasets[0].where`", "{column: value}"]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "where": "split"}, ["`datasets[0].where`", "{column: value}"]),
        (
            AMOPO,
            {"type": "axolotl_mopo.pairs", "where": {"split": ["a", "b"]}},
            ["`datasets[0].where.split`: a column's value must be one text, number, true or false, not ['a', 'b"],
        ),
        (AMOPO, {"type": "axolotl_mopo.pairs", "where": {"n": float("nan")}}, ["`datasets[0].where.n`"]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "keep_unfinished": True}, ["keep_unfinished` is not a known key"]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "ratings": "x"}, ["`datasets[0].ratings` is not a known key"]),
        (
            AMOPO,
            {"type": "axolotl_mopo.helpsteer2", "ratings_split": "x"},
            ["`ratings_split` has no effect without `ratings`"],
        ),
        (HELPFUL, {"type": "axolotl_mopo.hh_rlhf", "min_score_ratio": 2}, ["min_score_ratio` is not a known key"]),
        (
            HELPFUL,
            {"type": "axolotl_mopo.shp", "min_score_ratio": 0.5},
            ["`datasets[0].min_score_ratio`", "at least 1"],
        ),
        (
            HELPFUL,
            {"type": "axolotl_mopo.responses", "objective": "a", "keep_unfinished": "yes"},
            ["`datasets[0].keep_unfinished`", "are kept: true or false"],
        ),
        (AMOPO, {"type": "axolotl_mopo.pairs", "path": None}, ["`datasets[0].path` is None; it must name a file"]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "path": "p" * 999}, ["`datasets[0].path` cannot be read"]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "shards": 10}, ["`datasets[0].shards` has no effect", "split: train["]),
        (AMOPO, {"type": "axolotl_mopo.pairs", "name": ["a", "b"]}, ["`datasets[0].name` is a list", "one entry for"]),
        (
            changed(AMOPO, seed="x"),
            {"type": "axolotl_mopo.pairs", "max_pairs_per_prompt": 2},
            ["`seed` is 'x'; it must be a whole number"],
        ),
    ],
)
def test_an_entry_that_cannot_work_is_refused(base, entry, words):
    text = refusal(changed(base, datasets=[{"path": "data.jsonl", **entry}]))
    for word in words:
        assert word in text


def test_a_test_set_of_the_hub_needs_its_split():
    entry = {"path": "nvidia/HelpSteer2", "type": "axolotl_mopo.helpsteer2"}
    text = refusal(changed(AMOPO, datasets=[entry], test_datasets=[entry]))
    assert "`test_datasets[0].split` is missing; Axolotl would evaluate on the train split" in text
    cfg = changed(AMOPO, datasets=[dict(entry)], test_datasets=[{**entry, "split": "validation"}])
    MOPOPlugin().register(cfg)


def test_a_test_folder_needs_its_split_unless_it_is_saved_whole(tmp_path):
    entry = {"path": str(tmp_path), "type": "axolotl_mopo.pairs"}
    assert "`test_datasets[0].split` is missing" in refusal(changed(AMOPO, test_datasets=[entry]))
    (tmp_path / "state.json").write_text("{}")
    MOPOPlugin().register(changed(AMOPO, test_datasets=[entry]))


def test_an_entry_that_an_anchor_shares_is_bound_for_each_section():
    entries = [{"path": "pairs.jsonl", "type": "axolotl_mopo.pairs", "field_chosen": "good"}]
    cfg = copy.deepcopy(AMOPO) | {"datasets": entries, "test_datasets": entries}
    MOPOPlugin().register(cfg)
    assert cfg["datasets"][0]["type"] != cfg["test_datasets"][0]["type"]
    assert len(cfg["mopo_data"]) == 2


def test_margins_in_another_order_are_read_from_the_same_rows():
    margins = {"safer": {"source": "column"}, "brief": {"source": "length", "unit": "words"}}
    weights = {"better": 0.5, "safer": 0.3, "brief": 0.2}
    one, other = (
        spec(changed(MODPO, modpo__weights=weights, modpo__margins=given), type="axolotl_mopo.pairs")
        for given in (margins, dict(reversed(margins.items())))
    )
    assert one.key == other.key
    assert list(one.settings.margins) == list(other.settings.margins) == ["brief", "safer"]
