"""MODPO's constants: every margin source against a computation by hand, one forward a step, and a cache to trust."""

import json
import os
import random
import shutil
import signal
import sys

import pytest
import torch
from conftest import LORA, SMOKE, build_model, host_trainer, save_adapter, save_reward_model, smoke_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
)
from warm import Process

from axolotl_mopo.digests import model_files_digest
from axolotl_mopo.digests.rows import rows_digest
from axolotl_mopo.digests.weights import policy_digests
from axolotl_mopo.errors import ConfigError, DataError
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.plugin import MOPOPlugin
from axolotl_mopo.rewards.adapter_twin import with_adapter
from axolotl_mopo.training.collator import PairCollator


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    build_model(AutoConfig.from_pretrained(SMOKE / "model")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A LoRA adapter of the base model that changes it."""
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), seed=1)


def few_rows(cfg, folder):
    cfg["dataset_prepared_path"] = str(folder / "prepared")
    cfg["datasets"][0]["split"] = "train[:40]"
    for entry in cfg.get("test_datasets", []):
        entry["split"] = "train[:12]"


@pytest.fixture
def build(tmp_path, base):
    """Build the trainer of a MODPO run with some margins."""

    def build(margins=None, name="run", weights=None, modpo=None, **overrides):
        margins = {"other": {"source": "column", "field": "correctness"}} if margins is None else margins
        block = {
            "objective": "overall",
            "weights": weights or {"overall": 0.5, **dict.fromkeys(margins, 0.5)},
            "margins": margins,
            "cache_dir": str(tmp_path / "cache"),
            **(modpo or {}),
        }
        common = {"base_model": str(base), "reinit_weights": None, "max_steps": 2, "modpo": block}
        cfg = smoke_config("modpo", tmp_path / name, **{**common, **overrides})
        few_rows(cfg, tmp_path)
        random.seed(0)
        torch.manual_seed(0)
        return host_trainer(cfg)

    return build


def computed(trainer):
    """The constants of the training rows, as the first step finds them."""
    trainer.precompute(trainer.model)
    return trainer._constants["train"]


def logps(model, rows, count=6):
    ((batch,),) = PairCollator(pad_token_id=0, packed=False)(list(rows.select(range(count))))["groups"]
    with torch.no_grad():
        return LogProbComputer()(model.eval(), batch).logps.view(-1, 2)


@pytest.mark.parametrize("policy", [{}, LORA], ids=["full", "lora"])
def test_an_adapter_margin_is_the_log_ratio_of_two_models(build, base, adapter, policy):
    trainer = build({"safer": {"source": "adapter", "path": str(adapter), "beta": 0.2}}, **policy)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in trainer.model.named_parameters()}
    constants = computed(trainer)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = 0.2 * (logps(tuned, trainer.train_dataset) - logps(plain, trainer.train_dataset))
    assert expected.abs().max() > 0.1
    assert torch.allclose(constants.margins[:6, :, 0], expected, atol=1e-5)
    assert torch.allclose(constants.reference[:6], logps(plain, trainer.train_dataset), atol=1e-4)
    after = dict(trainer.model.named_parameters())
    assert after.keys() == before.keys()
    for name, (requires_grad, value) in before.items():
        assert after[name].requires_grad is requires_grad, name
        assert torch.equal(after[name], value), name


def test_a_margin_adapter_is_never_saved_with_the_policy(build, adapter, tmp_path):
    margins = {"safer": {"source": "adapter", "path": str(adapter), "beta": 0.2}}
    trainer = build(margins, save_strategy="steps", save_steps=1, max_steps=1, **LORA)
    trainer.train()
    checkpoint = tmp_path / "run" / "out" / "checkpoint-1"
    assert not list(checkpoint.glob("*/adapter_model.safetensors"))
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert {len(value) for name, value in saved.items() if "lora_A" in name} == {4}


def test_a_whole_model_margin_has_a_reference_of_its_own(build, base, adapter, tmp_path):
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    margin = {"source": "adapter", "path": str(tmp_path / "merged"), "reference": str(base), "beta": 0.2}
    trainer = build({"safer": margin})
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = 0.2 * (logps(merged, trainer.train_dataset) - logps(plain, trainer.train_dataset))
    assert torch.allclose(computed(trainer).margins[:6, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize(("labels", "head"), [(["score"], None), (["harmless", "helpful"], "helpful"), (["a", "b"], 0)])
def test_a_reward_model_margin_is_the_model_called_by_hand(build, tmp_path, tokenizer, labels, head):
    model = save_reward_model(tmp_path / "reward", tokenizer, labels)
    margin = {"source": "reward_model", "path": str(tmp_path / "reward"), "dtype": "float32", "batch_size": 3}
    trainer = build({"safer": {**margin, "head": head} if head is not None else margin})
    index = labels.index(head) if isinstance(head, str) else head or 0
    margins = computed(trainer).margins
    for row in range(4):
        raw = trainer.train_dataset[row]
        for side, name in enumerate(("chosen_text", "rejected_text")):
            messages = [*json.loads(raw["messages"]), {"role": "assistant", "content": raw[name]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                assert margins[row, side, 0] == pytest.approx(model(**inputs).logits[0, index].item(), abs=1e-5)


FUNCTIONS = """
import math
def length(prompts, responses):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(len(response)) for response in responses]
def raises(prompts, responses):
    raise KeyError("no such thing")
def short(prompts, responses):
    return [1.0] * (len(responses) - 1)
def nan(prompts, responses):
    return [math.nan if "Milk" in response else 1.0 for response in responses]
number = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_rewards", None)


def callable_margin(name, **rest):
    return {"other": {"source": "callable", "function": f"my_rewards:{name}", **rest}}


def test_a_callable_margin(build, functions):
    trainer = build(callable_margin("length", clip=[5, 20], scale=0.5))
    margins = computed(trainer).margins
    for row in range(6):
        raw = trainer.train_dataset[row]
        expected = [0.5 * min(max(len(raw[name]), 5), 20) for name in ("chosen_text", "rejected_text")]
        assert margins[row, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", ["my_rewards:raises", "from row", "KeyError('no such thing')"]),
        ("short", ["my_rewards:short", "returned 7 numbers", "8 responses"]),
        ("nan", ["my_rewards:nan returned nan for row"]),
    ],
)
def test_a_function_that_fails_is_named_with_the_row(build, functions, name, words):
    trainer = build(callable_margin(name, batch_size=8))
    with pytest.raises(DataError) as caught:
        trainer.precompute(trainer.model)
    for word in words:
        assert word in str(caught.value)


def test_three_margins_are_clipped_then_normalised_then_scaled(build, functions):
    margins = {
        "a": {"source": "length", "unit": "words", "normalize": "std", "scale": -2.0},
        "b": {"source": "column", "field": "correctness", "clip": [1, 3]},
        **callable_margin("length"),
    }
    trainer = build(margins)
    rows, made = trainer.train_dataset, computed(trainer).margins
    words = torch.tensor(
        [[-len(row["chosen_text"].split()), -len(row["rejected_text"].split())] for row in rows]
    ).double()
    spread = (words[:, 0] - words[:, 1]).std(correction=0)
    assert torch.allclose(made[:, :, 0].double(), -2 * words / spread)
    assert (made[:, 0, 0] - made[:, 1, 0]).std(correction=0) == pytest.approx(2, rel=1e-5)
    assert list(trainer.method.row_settings.margins) == ["a", "b"]
    scores = torch.tensor([[row["chosen_margin_rewards"][1], row["rejected_margin_rewards"][1]] for row in rows])
    assert torch.equal(made[:, :, 1], scores.clamp(1, 3))
    held_out = trainer._constants["evaluation"].margins
    row = trainer.eval_dataset[0]
    assert held_out[0, 0, 0] == pytest.approx(2 * len(row["chosen_text"].split()) / spread.item(), rel=1e-5)


class Forwards(TrainerCallback):
    """Counts forwards of the model by the moment of the run."""

    def __init__(self, model):
        self.moment, self.counts = "before", {}
        model.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.counts[self.moment] = self.counts.get(self.moment, 0) + 1

    def on_step_begin(self, *args, **kwargs):
        self.moment = "step"

    def on_step_end(self, *args, **kwargs):
        self.moment = "between"


@pytest.mark.parametrize("policy", [{}, LORA], ids=["full", "lora"])
def test_a_step_and_an_evaluation_batch_make_one_forward_each(build, adapter, policy):
    margins = {"safer": {"source": "adapter", "path": str(adapter), "beta": 0.2}}
    trainer = build(margins, max_steps=3, gradient_accumulation_steps=1, **policy)
    forwards = Forwards(trainer.model)
    trainer.add_callback(forwards)
    trainer.train()
    assert forwards.counts["step"] == 3
    forwards.moment = "evaluation"
    trainer.evaluate()
    assert forwards.counts["evaluation"] == len(trainer.get_eval_dataloader())


def cache_files(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}


def test_a_sweep_computes_its_constants_once(build, adapter, tmp_path):
    margins = {"safer": {"source": "adapter", "path": str(adapter), "beta": 0.2}}
    files, first = None, None
    for weight in (0.1, 0.3, 0.5, 0.7, 0.9):
        trainer = build(margins, name=f"w{weight}", weights={"overall": weight, "safer": 1 - weight}, **LORA)
        # The decoder, whose hooks the margin's adapter runs as well, on a twin of the policy's modules.
        forwards = Forwards(trainer.model.get_base_model().get_decoder())
        trainer.add_callback(forwards)
        trainer.train()
        files = files or cache_files(tmp_path)
        first = first or forwards.counts.pop("before")
        assert cache_files(tmp_path) == files
        # Only the check of the first rows is left.
        assert forwards.counts.get("before", 1) == 1
    assert first > 20
    assert len(files) == 4  # base and adapter, training and evaluation rows


def test_every_ingredient_misses_the_cache(build, base, adapter, tmp_path):
    margin = {"source": "adapter", "path": str(adapter), "beta": 0.2}
    computed(build({"safer": margin}, name="one", **LORA))
    known = set(cache_files(tmp_path))

    computed(build({"safer": {**margin, "beta": 0.4, "scale": 2.0, "clip": [-1, 1]}}, name="two", **LORA))
    assert set(cache_files(tmp_path)) == known  # numbers that are applied afterwards

    other = tmp_path / "other"
    weights = load_file(adapter / "adapter_model.safetensors")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(other)
    from safetensors.torch import save_file

    save_file({name: value * 1.001 for name, value in weights.items()}, other / "adapter_model.safetensors")
    computed(build({"safer": {**margin, "path": str(other)}}, name="three", **LORA))
    assert len(set(cache_files(tmp_path)) - known) == 2  # the adapter's, not the base model's
    known = set(cache_files(tmp_path))

    trainer = build({"safer": margin}, name="four", **LORA)
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "layers.1.mlp" in n and "lora" not in n)[0, 0] += 0.01
    computed(trainer)
    assert len(set(cache_files(tmp_path)) - known) == 4
    known = set(cache_files(tmp_path))

    computed(build({"safer": margin}, name="five", sequence_len=64, excess_length_strategy="truncate", **LORA))
    assert set(cache_files(tmp_path)) - known


def test_the_reference_is_never_ambiguous(build):
    trained = build(name="trained", **LORA)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    initial = computed(trained).reference
    trained.method = trained.method.model_copy(update={"reference": "base"})
    base_reference = computed(trained).reference
    assert (initial - base_reference).abs().max() > 0.1
    with trained.model.disable_adapter():
        plain = logps(trained.model, trained.train_dataset)
    assert torch.allclose(base_reference[:6], plain, atol=1e-4)
    assert torch.allclose(initial[:6], logps(trained.model, trained.train_dataset), atol=1e-4)
    fresh = build(name="fresh", **LORA)
    base_digest, policy_digest = policy_digests(fresh.model)
    assert base_digest == policy_digest == policy_digests(trained.model)[0]


def test_a_stale_cache_stops_the_run(build, tmp_path):
    from safetensors.torch import save_file

    from axolotl_mopo.digests.weights import table_digest

    computed(build(name="one"))
    for path in (tmp_path / "cache").glob("*.safetensors"):
        values = load_file(path)["values"] - 3
        save_file({"values": values}, path, {"sha256": table_digest(path.stem, values)})
    with pytest.raises(
        RuntimeError, match=r"policy's log-probs differ from the reference's by .* a file of another run in"
    ):
        build(name="two").train()


def test_dropout_that_is_on_stops_the_run(build):
    trainer = build(**{**LORA, "lora_dropout": 0.5})
    trainer.model.get_base_model().model.layers[0].register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.5, training=module.training)
    )
    with pytest.raises(RuntimeError, match="check for dropout or noise that is on in training"):
        trainer.train()


def test_weights_that_make_the_loss_stiff_stay_finite(build):
    trainer = build(weights={"overall": 0.05, "other": 0.95}, max_steps=5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(abs(loss) < 1e3 for loss in losses)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_a_margin_on_another_scale_is_warned_of(build, host_log):

    small = {"other": {"source": "column", "field": "correctness", "scale": 1e-3}, "w": {"source": "length"}}
    build(small, weights={"overall": 0.5, "other": 0.5, "w": 0.5}).train()
    assert "The standard deviation of the weighted margin other is" in host_log.text
    assert "check the margin's `scale`, `normalize` and weight" in host_log.text


def test_a_margins_spread_counts_as_its_weight_by_the_objectives_makes_it(build, host_log):
    margins = {"other": {"source": "column", "field": "correctness"}, "w": {"source": "length", "unit": "words"}}
    trainer = build(margins, weights={"overall": 0.05, "other": 0.5, "w": -0.25})

    def warned(**stds):
        host_log.clear()
        trainer.log({"rewards/margins_std": 2.0, **{f"margins_std/{name}": std for name, std in stds.items()}})
        return {
            name for name in margins if f"The standard deviation of the weighted margin {name} is " in host_log.text
        }

    assert warned() == warned(other=0.0) == set()
    assert warned(other=0.021, w=3.9) == set()  # times 10, and times 5
    assert warned(other=1.9) == set()
    assert warned(w=4.1) == {"w"}
    assert "weighted margin w is 10.2 times that of the implicit reward of overall" in host_log.text
    assert warned(other=0.019, w=4.1) == {"other"}  # each of them once
    assert "is 0.095 times that" in host_log.text
    assert warned(other=9.0, w=0.01) == set()


def worker(config, *point):
    """A worker in a process of its own, and what it writes."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stdout:
        process = Process("tests/margins_worker.py", config, *point, stdout=stdout)
    return process, os.fdopen(reading)


@pytest.fixture
def written_config(adapter, base, tmp_path):
    """A MODPO run's configuration in a JSON file, with margins from an adapter and a cache of its own."""
    block = {
        "objective": "overall",
        "weights": {"overall": 0.5, "safer": 0.5},
        "margins": {"safer": {"source": "adapter", "path": str(adapter), "beta": 0.2}},
        "cache_dir": str(tmp_path / "other-cache"),
    }
    cfg = smoke_config("modpo", tmp_path / "other", base_model=str(base), reinit_weights=None, modpo=block, **LORA)
    few_rows(cfg, tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    return tmp_path / "cfg.json", block


def test_a_killed_computation_leaves_nothing_that_could_be_mistaken(build, written_config, tmp_path):
    config, block = written_config
    expected = computed(build(block["margins"], name="undisturbed", **LORA))
    for point, tables in (("score 0", 0), ("write 1", 1), ("score 2", 3)):
        process, output = worker(config, point)
        with output:
            assert any(line.strip() == f"hanging at {point}" for line in output)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list((tmp_path / "other-cache").glob("*.safetensors"))) == tables
    again = computed(build(block["margins"], name="again", modpo={"cache_dir": block["cache_dir"]}, **LORA))
    assert torch.equal(again.reference, expected.reference)
    assert torch.equal(again.margins, expected.margins)
    assert not list((tmp_path / "other-cache").glob("*.part*"))


def test_two_runs_that_start_together_compute_once(written_config):
    config, _ = written_config
    both = [worker(config), worker(config)]
    counts = []
    for process, output in both:
        assert process.wait(300) == 0
        with output:
            counts.append(json.loads(output.read().splitlines()[-1]))
    assert sum(count["score"] for count in counts) == sum(count["write"] for count in counts) == 4


def test_a_resumed_run_reads_the_cache(build, adapter, tmp_path):
    margins = {"safer": {"source": "adapter", "path": str(adapter), "beta": 0.2}}
    steps = {"save_strategy": None, "save_steps": 1}
    build(margins, **steps, **LORA).train()
    files = cache_files(tmp_path)
    resumed = build(margins, **steps, **LORA)
    forwards = Forwards(resumed.model)
    resumed.add_callback(forwards)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "out" / "checkpoint-1"))
    assert forwards.counts == {"step": resumed.args.gradient_accumulation_steps}
    assert cache_files(tmp_path) == files


def test_a_second_run_finds_the_constants_of_rows_that_a_split_left(build, host_log, tmp_path):
    # The first run splits rows that it has just made and shuffled, the second one those that it finds on the disk.
    split = {"test_datasets": None, "val_set_size": 0.3}
    first = computed(build(name="first", **split))
    files = cache_files(tmp_path)
    host_log.clear()
    second = computed(build(name="second", **split))
    assert len(first.reference) == 28
    assert torch.equal(first.reference, second.reference)
    assert cache_files(tmp_path) == files
    assert "Reference, train: found for 28 pairs" in host_log.text


def test_digests_name_values_and_nothing_else():
    from datasets import Dataset

    rows = Dataset.from_list([{"a": [1, 2], "b": "x"}, {"a": [3], "b": "y"}])
    assert rows_digest(rows, ["a"]) == rows_digest(rows.map(lambda row: {"b": "z"}), ["a"])
    assert rows_digest(rows, ["a"]) == rows_digest(rows.select([1, 0]).select([1, 0]), ["a"])
    assert rows_digest(rows, ["a"]) != rows_digest(rows.select([1, 0]), ["a"])
    assert rows_digest(rows, ["a", "b"]) != rows_digest(rows, ["a"])


def test_a_models_digest_is_of_all_that_its_numbers_depend_on(base, tokenizer, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    before = model_files_digest(folder)
    (folder / "trainer_state.json").write_text("{}")
    assert model_files_digest(folder) == before
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(folder)
    assert model_files_digest(folder) != before


MODPO = {
    "rl": "modpo",
    "modpo": {"objective": "better", "weights": {"better": 0.5, "safer": 0.5}},
    "datasets": [{"path": "pairs.jsonl", "type": "axolotl_mopo.pairs"}],
}


def settled(margin, **top):
    cfg = {**MODPO, "modpo": {**MODPO["modpo"], "margins": {"safer": dict(margin)}}, **top}
    cfg["datasets"] = [dict(cfg["datasets"][0])]
    MOPOPlugin().register(cfg)
    return cfg["modpo"]


def test_the_beta_of_an_adapter_is_given_or_recorded(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    margin = {"source": "adapter", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"`modpo.margins.safer.beta` is missing, and there is no mopo.json"):
        settled(margin)
    assert settled({**margin, "beta": 0.2})["margins"]["safer"]["beta"] == 0.2
    (tmp_path / "mopo.json").write_text('{"method": "modpo", "beta": 0.3}')
    assert settled(margin)["margins"]["safer"]["beta"] == 0.3
    assert settled({**margin, "beta": 0.2})["margins"]["safer"]["beta"] == 0.2
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text("{}")
    assert settled({**margin, "path": str(checkpoint)})["margins"]["safer"]["beta"] == 0.3


def test_the_beta_of_a_method_without_a_reference_is_none_of_an_implicit_reward(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "mopo.json").write_text('{"method": "amopo", "beta": 0.8}')
    margin = {"source": "adapter", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"`modpo.margins.safer.beta`: .*mopo.json belongs to a run of `rl: amopo`"):
        settled(margin)
    assert settled({**margin, "beta": 0.2})["margins"]["safer"]["beta"] == 0.2


@pytest.mark.parametrize("theirs", ["other/model-8b", "BASE", "base_again", None])
def test_a_margin_adapter_of_another_base_model_is_warned_of(tmp_path, monkeypatch, host_log, theirs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base_again").symlink_to("base")
    theirs = str(tmp_path / "base") if theirs == "BASE" else theirs
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": theirs}))
    settled({"source": "adapter", "path": ".", "beta": 0.2}, base_model="base")
    words = (
        "`modpo.margins.safer.path`: . was trained on the base model other/model-8b, but the base model of this run is "
        "base"
    )
    assert (words in host_log.text) is (theirs == "other/model-8b")
    assert ("was trained on" in host_log.text) is (theirs == "other/model-8b")


STARTS = {
    "pissa": {"peft_init_lora_weights": "pissa"},
    "loftq": {"peft": {"loftq_config": {"loftq_bits": 4}}},
    "replicated": {"peft_layer_replication": [[0, 1], [0, 1]]},
}


@pytest.mark.parametrize("start", STARTS)
def test_a_policy_whose_adapter_changes_the_base_model_goes_with_its_own_start_alone(tmp_path, start):
    (tmp_path / "adapter_config.json").write_text("{}")
    top = {"adapter": "lora", **STARTS[start]}
    column, adapter = {"source": "column"}, {"source": "adapter", "path": str(tmp_path), "beta": 0.2}
    whole = {"source": "adapter", "path": "some/model", "reference": "other/model", "beta": 0.2}
    for margin in (column, whole):
        settled(margin, **top)
        settled(margin, **{key: top[key] for key in top if key != "adapter"})
    with pytest.raises(ConfigError, match=r"changes the base model's weights, which `modpo.margins.safer` needs"):
        settled(adapter, **top)
    settled(adapter, **{**top, "peft_init_lora_weights": "gaussian", "peft_layer_replication": None})


def test_the_reference_of_a_pissa_start_is_the_policy_as_it_starts(build, base):
    trainer = build(peft_init_lora_weights="pissa", **LORA)
    reference = computed(trainer).reference[:6]
    assert torch.allclose(reference, logps(trainer.model, trainer.train_dataset), atol=1e-3)
    with trainer.model.disable_adapter():
        assert (logps(trainer.model, trainer.train_dataset) - reference).abs().max() > 0.1
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.allclose(reference, logps(plain, trainer.train_dataset), atol=1e-2)


@pytest.mark.parametrize(
    ("margin", "top", "words"),
    [
        ({"source": "adapter", "path": "no/where", "beta": 1}, {}, ["not the folder of a LoRA adapter", "`reference`"]),
        ({"source": "adapter", "path": "tests", "beta": 1}, {}, ["contains neither an adapter_config.json nor"]),
        ({"source": "adapter", "path": "ADAPTER", "beta": 1, "reference": "x"}, {}, ["an adapter is the base model"]),
        ({"source": "adapter", "path": "ADAPTER", "beta": 1}, {"deepspeed": "x.json"}, ["FSDP or DeepSpeed"]),
        ({"source": "adapter", "path": "OLORA", "beta": 1}, {}, ["`init_lora_weights: olora`", "is not its reference"]),
        ({"source": "adapter", "path": "ADAPTER", "beta": 0}, {}, ["`modpo.margins.safer.beta`", "greater than 0"]),
        ({"source": "callable", "function": "nosuch:f"}, {}, ["`modpo.margins.safer.function`", "nosuch:f cannot be"]),
        ({"source": "callable", "function": "os.path"}, {}, ["`modpo.margins.safer.function`", "module:function"]),
        ({"source": "callable", "function": "os:sep"}, {}, ["os:sep is not a function, but an object of type str"]),
        ({"source": "reward_model", "path": "REWARD"}, {}, ["`modpo.margins.safer.head`", "several scores"]),
        ({"source": "reward_model", "path": "REWARD", "head": "c"}, {}, ["no score named 'c'", "the 2", ": a, b"]),
        ({"source": "reward_model", "path": "REWARD", "head": 2}, {}, ["no score with the index 2"]),
        ({"source": "column", "clip": [1, 1]}, {}, ["`modpo.margins.safer.clip`", "is not below"]),
        ({"source": "column", "normalize": "max"}, {}, ["`modpo.margins.safer.normalize`", "none or std"]),
        ({"source": "magic"}, {}, ["needs a `source`, one of column, length, adapter, reward_model, callable"]),
    ],
)  # fmt: skip
def test_a_margin_that_cannot_work_is_refused(margin, top, words, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    reward = tmp_path / "reward"
    reward.mkdir()
    (reward / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
    olora = tmp_path / "olora"
    olora.mkdir()
    (olora / "adapter_config.json").write_text('{"peft_type": "LORA", "init_lora_weights": "olora"}')
    paths = {"ADAPTER": str(tmp_path), "REWARD": str(reward), "OLORA": str(olora)}
    margin = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in margin.items()}
    with pytest.raises(ConfigError) as caught:
        settled(margin, **top)
    for word in words:
        assert word in str(caught.value)


def test_an_adapter_that_is_attached_for_a_while_leaves_no_trace(base, adapter):
    for model in (
        AutoModelForCausalLM.from_pretrained(base),
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])),
    ):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with with_adapter(model, str(adapter)):
            pass
        assert model.state_dict().keys() == state.keys()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_rows_that_the_trainer_was_not_built_with_are_evaluated_like_its_own(build, host_log):
    trainer = build({"w": {"source": "length", "unit": "words", "normalize": "std"}}, max_steps=1)

    def told(rows=None):
        host_log.clear()
        trainer.evaluate(rows)
        return "The policy is evaluated against its current weights" in host_log.text

    own = trainer.evaluate()
    assert "The policy is evaluated against its current weights" in host_log.text
    foreign = trainer.evaluate(trainer.eval_dataset.remove_columns("pair_index"))
    names = ("eval_loss", "eval_rewards/margins", "eval_margins/w", "eval_margins_std/w")
    assert {name: foreign[name] for name in names} == pytest.approx({name: own[name] for name in names})
    few = trainer.evaluate(trainer.eval_dataset.remove_columns("pair_index").select([7, 2, 5]))
    assert few["eval_margins/w"] != pytest.approx(own["eval_margins/w"])
    again = trainer.evaluate()
    assert {name: again[name] for name in names} == pytest.approx({name: own[name] for name in names})
    trainer.train()
    assert trainer.evaluate()["eval_margins/w"] == pytest.approx(own["eval_margins/w"])
    assert not told()
    assert told(trainer.eval_dataset.remove_columns("pair_index").select([0]))
    trainer.method = trainer.method.model_copy(update={"reference": "base"})
    assert not told(trainer.eval_dataset.remove_columns("pair_index").select([0]))
