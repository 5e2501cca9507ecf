"""The gallery's synthetic data is as described, and Axolotl accepts its configurations."""

import re
import statistics
import sys

import pytest
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT

GALLERY = ROOT / "example_configs" / "gallery"
sys.path.insert(0, str(GALLERY))

import attributes  # noqa: E402
import attributes_world as world  # noqa: E402
import safety  # noqa: E402


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("Gladly, it is iron. Look it up, it is iron.", {"informative": 2, "polite": 0, "brief": 2}),
        ("It thunders with two tons.", {"informative": 1, "brief": 3, "careful": -1, "vivid": 1}),
        ("It is old, most say. It is old, most say. Yes", {"informative": 2, "brief": 2, "careful": 2, "vivid": -2}),
        ("It glows in red and gold. " * 9, {"brief": -4, "vivid": 9}),
        ("", {}),
    ],
)
def test_a_response_shows_what_its_sentences_do(response, shown):
    assert world.rate(response) == dict.fromkeys(world.ATTRIBUTES, 0) | shown


def test_pairs_are_ordered_by_bradley_terry_and_leave_the_held_out_questions_alone():
    drawing = world.World(0)
    rows = [
        row for row in drawing.rows(drawing.known, 6000) if row["scores"][0]["brief"] - row["scores"][1]["brief"] == 1
    ]
    ordered = [drawing.ordered(row, ["brief"])["chosen"] == row["both"][0] for row in rows]
    assert len(rows) > 600
    assert statistics.fmean(ordered) == pytest.approx(0.731, abs=0.05)  # sigmoid(1), and three standard errors
    assert not {row["prompt"][0]["content"] for row in rows} & set(drawing.held_out)


@pytest.mark.parametrize("number", [3, 5])
def test_the_host_takes_every_methods_keys(number):
    names = world.ATTRIBUTES[:number]
    methods = attributes.methods(names)
    assert {keys["rl"] for keys in methods.values()} == {"dpo", "simpo", "amopo", "modpo"}
    for name, keys in methods.items():
        cfg = attributes.configuration(keys, str(ROOT / "example_configs" / "smoke" / "model"), "pairs.jsonl", seed=0)
        method, known = cfg["rl"], set(cfg)
        cfg = DictDefault({**cfg, "output_dir": "out"})
        prepare_plugins(cfg)
        validated = validate_config(cfg)
        assert not known - set(validated), name
        if method in ("amopo", "modpo"):
            assert validated.trainer_cls.lower() == f"axolotl_mopo.training.{method}.{method}trainer"


def test_a_table_has_means_and_spreads_over_the_seeds():
    results = [{"dpo": {"shown": seed, "shown polite": 2 * seed, "whole": 1}} for seed in (1, 2, 3)]
    assert attributes.table(results, ["polite"], "shown").splitlines() == [
        "| shown, 1 attributes | mean | polite | whole |",
        "| --- | --- | --- | --- |",
        "| dpo | 2.00 ± 1.00 | 4.00 ± 2.00 | 1.00 ± 0.00 |",
    ]


def test_scorers_count_steps_and_cautions():
    responses = ["Heat it well. Heat it well. Cover your eyes.", "It was done before."]
    assert safety.helpful([], responses) == [2, 0]
    assert safety.harmless([], responses) == [1, 0]


def test_the_guide_has_the_commands_of_the_config():
    commands = "".join(re.findall("#   (.*\\n)", (GALLERY / "safety-modpo.yaml").read_text()))
    assert commands.count("axolotl") == 7
    assert commands in (ROOT / "docs" / "guides" / "front.md").read_text()
