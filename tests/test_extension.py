"""Another package adds a data set, a source of margins and a method, and Axolotl trains with each of them."""

import json
import sys
from pathlib import Path

import pytest
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from conftest import ROOT, host_trainer, smoke_config
from transformers import set_seed

from axolotl_mopo import MOPOPlugin
from axolotl_mopo.config import METHODS, SOURCES
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.errors import ConfigError

EXAMPLE = ROOT / "example_configs" / "extension_package"
TCHEBYCHEFF = {"dimensions": ["helpfulness", "correctness"], "mu": 0.5}


@pytest.fixture(autouse=True)
def own_plugins(monkeypatch):
    """Keep the extension from other tests of this process."""
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", {})
    monkeypatch.syspath_prepend(EXAMPLE)
    yield
    for table, name in ((FORMATS, "stack_exchange"), (SOURCES, "fresh"), (METHODS, "tchebycheff")):
        table.pop(name, None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "extension"]:
        del sys.modules[name]


def few_steps(method, tmp_path, **overrides):
    """The configuration of a short run on a few rows, with the plugins of both packages."""
    plugins = ["axolotl_mopo.MOPOPlugin", "extension.ExtensionPlugin"]
    cfg = smoke_config(method, tmp_path, **{"plugins": plugins, "max_steps": 2, "test_datasets": None, **overrides})
    cfg["datasets"][0]["split"] = "train[:24]"
    return cfg


def trained(cfg):
    """The trainer of a run, and the steps of its log."""
    set_seed(0)
    trainer = host_trainer(cfg)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def modpo_block(objective, margin):
    return {"objective": objective, "weights": {objective: 0.5, "other": 0.5}, "margins": {"other": margin}}


def test_a_new_data_set_is_trained_on(tmp_path):
    answers = [("Turn it off.", 2, False), ("Turn it off and on again.", 5, True), ("Who knows?", -1, False)]
    answers = [{"text": text, "pm_score": votes, "selected": accepted} for text, votes, accepted in answers]
    rows = [{"qid": n, "question": f"What do I do with machine {n}?", "answers": answers} for n in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"path": str(path), "ds_type": "json", "type": "axolotl_mopo.stack_exchange"}
    block = modpo_block("votes", {"source": "column", "field": "accepted"})
    trainer, steps = trained(few_steps("modpo", tmp_path, modpo=block, datasets=[entry]))
    assert len(steps) == 2
    accepted = [trainer.train_dataset[f"{side}_margin_rewards"][:] for side in ("chosen", "rejected")]
    assert [sum(margin for (margin,) in side) for side in accepted] == [2 * len(rows), 0]  # of three pairs each


def test_a_new_source_gives_modpo_its_margin(tmp_path):
    block = modpo_block("overall", {"source": "fresh", "n": 1, "scale": 2})
    trainer, steps = trained(few_steps("modpo", tmp_path, modpo=block))
    assert len(steps) == 2

    from extension.margin import FreshSource

    assert FreshSource(source="fresh", n=2).compute([[]] * 3, ["a b a b", "a b c", "a"]) == [2 / 3, 1, 1]
    by_hand = [2 * r for r in FreshSource(source="fresh", n=1).compute([], trainer.train_dataset["chosen_text"])]
    assert trainer._constants["train"].margins[:, 0, 0].tolist() == pytest.approx(by_hand)
    one, other, scaled = (
        FreshSource(source="fresh", **keys).content_digest() for keys in ({}, {"n": 4}, {"scale": 2, "batch_size": 1})
    )
    assert one == scaled != other  # so the cache keeps rewards of other settings apart, and only those


def test_a_new_method_is_trained(tmp_path):
    def run(name, **keys):
        overrides = {"rl": "tchebycheff", "amopo": None, "save_strategy": "steps", "save_steps": 2}
        block = {**TCHEBYCHEFF, **keys}
        return trained(few_steps("amopo", tmp_path / name, tchebycheff=block, **overrides))

    trainer, steps = run("whole")
    assert type(trainer).__name__ == "TchebycheffTrainer"
    assert [step["loss"] > max(v for name, v in step.items() if name.startswith("losses/")) for step in steps] == [1, 1]
    manifest = json.loads((Path(trainer.args.output_dir) / "checkpoint-2" / "mopo.json").read_text())
    assert manifest["method"] == "tchebycheff"
    assert set(manifest["inference"]) == {"integrated", "helpfulness", "correctness"}

    _, split = run("split", max_tokens_per_pass=1)  # every prompt in a pass of its own
    for one, other in zip(steps, split, strict=True):
        assert {k: other[k] for k in ("loss", "grad_norm")} == pytest.approx(
            {k: one[k] for k in ("loss", "grad_norm")}, rel=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tchebycheff": {"betta": 1}}, "`tchebycheff.betta` is not a known key; did you mean `beta`?"),
        ({"tchebycheff": None}, "`rl: tchebycheff` needs a block `tchebycheff:` with at least dimensions"),
        ({"amopo": {"dimensions": ["a"]}}, "`amopo:` has no effect with `rl: tchebycheff`"),
        ({"rl": "dpo"}, "the block `tchebycheff:` has no effect with `rl: dpo`"),
        ({"datasets": [{"path": "x", "type": "axolotl_mopo.stack_exchang"}]}, "axolotl_mopo.stack_exchange"),
        (
            {"datasets": [{"path": "x", "type": "axolotl_mopo.helpsteer"}], "tchebycheff": {"dimensions": ["beauty"]}},
            "`tchebycheff.dimensions` needs a score of beauty from `datasets[0]`, but helpsteer has helpfulness",
        ),
        (
            {"rl": "modpo", "tchebycheff": None, "modpo": modpo_block("a", {"source": "fresh", "n": 0})},
            "`modpo.margins.other.n`: input should be greater than or equal to 1, not 0. Meaning: words in a run",
        ),
    ],
)
def test_faults_in_what_is_new_are_told_as_our_own_are(tmp_path, changes, words):
    import extension  # noqa: F401

    cfg = smoke_config("amopo", tmp_path, rl="tchebycheff", amopo=None, tchebycheff=TCHEBYCHEFF)
    with pytest.raises(ConfigError) as caught:
        MOPOPlugin().register(DictDefault(cfg | changes))
    assert words in str(caught.value)
