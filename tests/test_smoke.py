"""`axolotl mopo smoke`: the keys that it keeps and replaces, its training run, and what it refuses."""

import importlib
import inspect
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from conftest import CONFIGS as ARCHITECTURES
from conftest import LORA, MIXTURES, ROOT, SMOKE, save_reward_model, smoke_config
from datasets import Dataset
from peft import PeftConfig
from test_example_configs import CONFIGS as EXAMPLES
from test_formats import rated, reader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Phi3Config
from warm import AXOLOTL, python

import axolotl_mopo.commands.smoke as smoke_module
from axolotl_mopo.cli import mopo
from axolotl_mopo.commands import tiny_models
from axolotl_mopo.commands.cpu_keys import for_a_cpu
from axolotl_mopo.commands.sample_rows import PAIRS
from axolotl_mopo.commands.smoke import reason, train
from axolotl_mopo.commands.smoke_plan import plan
from axolotl_mopo.commands.synthetic_rows import made_up_rows, rows_of_axolotl
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.errors import ConfigError

PATHS = {"base_model", "datasets", "test_datasets", "output_dir", "dataset_prepared_path"}
ADDED = {"bf16", "fp16", "tf32", "max_steps", "logging_steps"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working folder, a folder for temporary files, and training in a fork of the warm process."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")

    def warm(config, log, environment):
        done = python(AXOLOTL, "train", config, "--launcher", "python", cwd=Path.cwd(), env=environment)
        log.write_text(done.stdout + done.stderr)
        return done.returncode

    monkeypatch.setattr(smoke_module, "train", warm)
    return tmp_path / "here"


def smoke(*arguments, fails=False):
    result = CliRunner().invoke(mopo, ["smoke", *map(str, arguments)])
    assert (result.exit_code != 0) is fails, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.output


def planned(config, folder, *samples, trust=False):
    """The plan, and the configuration of the test."""
    folder.mkdir(exist_ok=True)
    if isinstance(config, dict):
        path = folder / "given.yaml"
        path.write_text(yaml.safe_dump(config))
        config = path
    made = plan(config, folder, [str(sample) for sample in samples], trust)
    return made, yaml.safe_load(made.config.read_text())


@pytest.mark.parametrize("name", EXAMPLES)
def test_everything_is_kept_but_what_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made, cfg = planned(EXAMPLES[name], tmp_path)
    own = yaml.safe_load(EXAMPLES[name].read_text())
    said = {each.key for each in made.replaced}
    assert said <= set(own)
    for key in set(own) - said - PATHS - ADDED - {"modpo"}:
        assert cfg[key] == own[key], key
    assert set(cfg) <= set(own) | ADDED
    for key in {"output_dir", "dataset_prepared_path", "base_model"}:
        assert Path(cfg[key]).is_relative_to(tmp_path)
    for section in {"datasets", "test_datasets"} & set(own):
        for entry, before in zip(cfg[section], own[section], strict=True):
            assert Path(entry["path"]).is_relative_to(tmp_path)
            assert {**before, **entry} == {**entry, **{key: before[key] for key in set(before) - set(entry)}}
            assert entry["type"] == before["type"]
    assert AutoModelForCausalLM.from_pretrained(cfg["base_model"]).num_parameters() < 1_000_000
    assert len(AutoTokenizer.from_pretrained(cfg["base_model"])) > 256


TRAINED = [
    name if name in ("safety-modpo", "qwen2.5-7b-amopo-zero3") else pytest.param(name, marks=pytest.mark.smoke)
    for name in EXAMPLES
]


@pytest.mark.parametrize("name", TRAINED)
def test_an_example_passes(name, workplace):
    said = smoke(EXAMPLES[name])
    assert "passes: two steps of" in said
    assert "train_loss" in said
    assert list(workplace.iterdir()) == []
    assert list((workplace.parent / "temporary").iterdir()) == []


def test_margins_of_every_source_are_trained_with_stand_ins(workplace, monkeypatch):
    (workplace / "judging_of_smoke.py").write_text(
        "def words(prompts, responses):\n    return [float(len(text.split())) for text in responses]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{workplace}:{ROOT}")
    monkeypatch.syspath_prepend(str(workplace))
    margins = {
        "brief": {"source": "length", "unit": "words"},
        "talk": {"source": "callable", "function": "judging_of_smoke:words"},
        "reward": {"source": "reward_model", "path": "some/reward-model", "head": "kindness"},
        "expert": {"source": "adapter", "path": "outputs/expert"},
        "whole": {"source": "adapter", "path": "some/expert", "reference": "some/base", "beta": 0.2},
        "score": {"source": "column", "field": "helpfulness"},
    }
    cfg = {
        "base_model": "some/model",
        "plugins": ["axolotl_mopo.MOPOPlugin"],
        "rl": "modpo",
        "modpo": {"objective": "better", "weights": {"better": 0.5, **dict.fromkeys(margins, 0.1)}, "margins": margins},
        "datasets": [{"path": "nowhere/pairs", "type": "axolotl_mopo.pairs", "field_prompt": "query"}],
        "val_set_size": 0.1,
        "output_dir": "out",
        "sequence_len": 128,
        "micro_batch_size": 4,
        "num_epochs": 1,
        "learning_rate": 0.001,
        "load_in_4bit": True,
        **LORA,
        "adapter": "qlora",
    }
    (workplace / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    said = smoke("config.yaml", "--keep", "kept")
    assert "margin talk: the code of judging_of_smoke:words, which runs as in axolotl train" in said
    assert "its beta is assumed to be 0.1, since its mopo.json is not available" in said
    assert "adapter: qlora -> lora (4-bit weights need a GPU)" in said
    kept = workplace / "kept"
    used = yaml.safe_load((kept / "config.yaml").read_text())["modpo"]["margins"]
    assert used["score"] == margins["score"]
    assert AutoConfig.from_pretrained(used["reward"]["path"]).id2label == {0: "kindness"}
    assert PeftConfig.from_pretrained(used["expert"]["path"]).base_model_name_or_path == str(kept / "model")
    assert used["whole"] == {**margins["whole"], "path": str(kept / "margin-4"), "reference": str(kept / "model")}
    logged = json.loads((kept / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert {f"margins/{name}" for name in margins} <= {key for entry in logged for key in entry}
    assert sorted(path.name for path in workplace.iterdir()) == ["config.yaml", "judging_of_smoke.py", "kept"]
    assert "is not empty; name a new folder" in smoke("config.yaml", "--keep", "kept", fails=True)


def test_what_the_training_run_refuses_is_said_with_its_exit_code(workplace):
    cfg = smoke_config(
        "amopo", workplace, chat_template="jinja", chat_template_jinja="{{ raise_exception('no roles') }}"
    )
    (workplace / "config.yaml").write_text(yaml.safe_dump(cfg))
    said = smoke("config.yaml", fails=True)
    assert "no roles" in said
    assert "config.yaml fails: axolotl train ended with exit code 1." in said
    assert "Traceback" not in said
    assert [path.name for path in workplace.iterdir()] == ["config.yaml"]
    assert list((workplace.parent / "temporary").iterdir()) == []


def test_training_runs_in_a_process_of_its_own(tmp_path):
    cfg = smoke_config("amopo", tmp_path, amopo={"dimensions": ["helpfulness"], "betta": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    assert train(tmp_path / "config.yaml", tmp_path / "log.txt", {}) == 1
    assert reason((tmp_path / "log.txt").read_text()).startswith("axolotl_mopo.")
    assert "`amopo.betta` is not a known key" in reason((tmp_path / "log.txt").read_text())


def test_the_last_error_of_a_log_is_its_reason():
    log = (
        "[INFO] a\nTraceback (most recent call last):\n  File 'a', line 1\nKeyError: 'x'\n\nDuring handling\n"
        "Traceback (most recent call last):\n  File 'b'\n\x1b[31mmy.DataError\x1b[0m: datasets[0]\nand more\n"
        "nanobind: leaked 4 instances!\n - leaked instance\n"
    )
    assert reason(log) == "my.DataError: datasets[0]\nand more"
    assert reason("\n".join(map(str, range(90)))).splitlines() == [str(number) for number in range(50, 90)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"amopo": {"dimensions": ["helpfulness"], "betta": 1}},
            "`amopo.betta` is not a known key; did you mean `beta`",
        ),
        ({"rl": "dpo"}, "the block `amopo:` has no effect with `rl: dpo`"),
        ({"dpo_beta": 0.1}, "`dpo_beta` has no effect with `rl: amopo`"),
        (
            {"datasets": [{"path": "a/b", "type": "axolotl_mopo.pairs", "scale": 1}]},
            "`datasets[0].scale` is not a known",
        ),
        ({"datasets": None}, "`datasets` has no entry"),
        ({"base_model": None}, "`base_model` is None"),
        ({"plugins": ["axolotl_mopo.MOPOPlugin", "no_such_package.Plugin"]}, "no_such_package"),
    ],
)
def test_a_wrong_key_is_refused_before_anything_is_trained(change, message, workplace, monkeypatch):
    monkeypatch.setattr(smoke_module, "train", None)
    cfg = smoke_config("amopo", workplace) | change
    (workplace / "config.yaml").write_text(yaml.safe_dump(cfg))
    assert message in smoke("config.yaml", fails=True)
    assert [path.name for path in workplace.iterdir()] == ["config.yaml"]
    assert list((workplace.parent / "temporary").iterdir()) == []


def test_a_missing_sample_and_one_too_many_are_refused(workplace):
    (workplace / "config.yaml").write_text(yaml.safe_dump(smoke_config("modpo", workplace)))
    assert "--data: there is no file or folder none.jsonl" in smoke("config.yaml", "--data", "none.jsonl", fails=True)
    said = smoke("config.yaml", *("--data", SMOKE / "pairs.jsonl") * 3, fails=True)
    assert "--data is given 3 times, and there are 2 data-set entries" in said
    (workplace / "list.yaml").write_text("- a")
    assert "it is not a mapping of keys to values" in smoke("list.yaml", fails=True)


def test_own_rows_and_samples_come_before_rows_that_are_made_up(tmp_path):
    rows = [rated(f"{side} {n}", n % 5, 1, 1, 1, 1, prompt=f"p{n // 2}") for n in range(80) for side in ("a", "b")]
    Dataset.from_list(rows).to_json(tmp_path / "raw.jsonl")
    own = {
        "path": str(tmp_path / "raw.jsonl"),
        "ds_type": "json",
        "type": "axolotl_mopo.helpsteer",
        "split": "train[:90%]",
    }
    away = {**own, "path": "some/where", "name": "part", "data_files": "x.jsonl"}
    cfg = smoke_config("amopo", tmp_path, datasets=[own, away, away], test_datasets=None, eval_steps=None)
    cfg["amopo"] = {"dimensions": ["helpfulness"]}
    made, used = planned(cfg, tmp_path / "a", tmp_path / "raw.jsonl", tmp_path / "raw.jsonl")
    tables = [Dataset.from_parquet(entry["path"]).to_list() for entry in used["datasets"]]
    assert tables[0] == tables[1] == rows[: len(tables[0])]
    assert PAIRS <= len(tables[0]) < 4 * PAIRS
    assert tables[2][0]["prompt"].startswith("Question 0")
    assert used["datasets"][2] == {**own, "path": str(tmp_path / "a" / "datasets-2.parquet"), "ds_type": "parquet"} | {
        "split": "train"
    }
    assert made.notes[-1].endswith("made up for `type: axolotl_mopo.helpsteer`, since some/where is not available")


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_made_up_for_every_format(kind):
    entry = {"where": {"lang": "en"}} | ({"ratings": "some/ratings"} if kind == "helpsteer2" else {})
    scales = {
        "pairs": {"a": (0, 4), "b": (1, 10)},
        "amopo": {"a": (0, 4)},
        "responses": {"a": (0, 4), "b": (1, 10)},
        "ultrafeedback": {"helpfulness": (1, 5), "overall": (1, 10)},
        "helpsteer": {"helpfulness": (0, 4), "verbosity": (0, 4)},
        "safe_rlhf": {"severity_level": (0, 3)},
    }.get(kind, {})
    rows = made_up_rows(kind, entry, scales, PAIRS)
    assert all(row["lang"] == "en" for row in rows)
    order = {
        "safe_rlhf": ("better",),
        "responses": ("a",),
        "ultrafeedback": ("helpfulness",),
        "helpsteer": ("verbosity",),
    }
    names = tuple(scales)
    made = [pair for _, pair in reader(kind, rows, order.get(kind, ()), names, names, scales).pairs()]
    assert len(made) >= PAIRS / 2
    assert len({pair.prompt[0]["content"] for pair in made}) == len(made)
    for name in names:
        assert len({pair.chosen.scores[name] for pair in made}) > 1 or name == "severity_level"


@pytest.mark.parametrize("module", ["dpo.chatml", "dpo.chat_template", "dpo.passthrough", "kto.chatml"])
def test_rows_are_made_up_for_axolotls_own_preference_types(module):
    package, _, name = module.partition(".")
    strategies = importlib.import_module(f"axolotl.prompt_strategies.{module}")
    for kind, strategy in inspect.getmembers(strategies, inspect.isfunction):
        if strategy.__module__ != strategies.__name__:
            continue
        entry = {"type": f"{name}.{kind}"}
        made = strategy(DictDefault({"datasets": [entry], "chat_template": "chatml"}))
        transform = made[0] if isinstance(made, tuple) else made
        given = (
            {"tokenizer": tiny_models.byte_tokenizer()}
            if "tokenizer" in inspect.signature(transform).parameters
            else {}
        )
        for row in Dataset.from_list(rows_of_axolotl(entry, 3)).to_list():
            read = transform(row, **given)
            assert "Question" in read["prompt"], entry
            sides = ("chosen", "rejected") if package == "dpo" else ("completion",)
            assert all(isinstance(read[side], str) and read[side] for side in sides)


def test_ratings_that_are_not_at_hand_are_made_up_with_the_preferences(tmp_path):
    entry = {
        "path": "nvidia/HelpSteer2",
        "data_files": "preference/preference.jsonl.gz",
        "type": "axolotl_mopo.helpsteer2",
    }
    entry |= {"ratings": "nvidia/HelpSteer2", "ratings_split": "validation", "where": {"split": "train"}}
    cfg = smoke_config("amopo", tmp_path, datasets=[entry], test_datasets=None, eval_steps=None)
    cfg["amopo"] = {"dimensions": ["helpfulness", "correctness"]}
    _, used = planned(cfg, tmp_path / "a")
    entry = used["datasets"][0]
    rows = Dataset.from_parquet(entry["path"]).to_list()
    names = ("helpfulness", "correctness")
    made = list(reader("helpsteer2", rows, (), names, ratings=entry["ratings"], where=entry["where"]).pairs())
    assert len(made) == PAIRS
    assert "ratings_split" not in entry


def test_sizes_alone_are_shrunk():
    large = {
        "grouped": LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, rope_theta=5e5),
        "long": Phi3Config(
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
            },
        ),
        **{
            name: AutoConfig.for_model(name)
            for name in ("gemma3_text", "gpt_oss", "qwen3_next", "deepseek_v3", "mamba")
        },
        **{name: type(config)() for name, config in (ARCHITECTURES | MIXTURES).items()},
    }
    tokenizer = tiny_models.byte_tokenizer()
    for name, config in large.items():
        small = tiny_models.shrink(config)
        model = tiny_models.build(small, tokenizer, seed=0)
        assert model.num_parameters() < 2_000_000, name
        assert type(model).__name__ == config.architectures[0] if config.architectures else True
        assert small.model_type == config.model_type
        kinds = getattr(config, "layer_types", None) or []
        assert set(getattr(small, "layer_types", None) or []) == set(kinds), name
        if name == "grouped":
            assert (small.num_key_value_heads, small.num_hidden_layers) == (2, 2)
            assert small.rope_parameters == config.rope_parameters


def test_a_local_models_class_and_tokenizer_are_kept(tmp_path):
    config = AutoConfig.for_model("qwen3", num_hidden_layers=8, hidden_size=512, vocab_size=1024)
    config.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(tmp_path / "large")
    made, used = planned(smoke_config("modpo", tmp_path, base_model=str(tmp_path / "large")), tmp_path / "a")
    assert AutoConfig.from_pretrained(used["base_model"]).architectures == ["Qwen3ForCausalLM"]
    assert len(AutoTokenizer.from_pretrained(used["base_model"])) == 1024
    assert used["sequence_len"] == 512
    assert any("a tiny Qwen3ForCausalLM with random weights" in line for line in made.notes)


def test_a_model_with_code_of_its_own_needs_an_option(tmp_path):
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.StrangeConfig"}})
    )
    (folder / "configuration_strange.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n\n\nclass StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    )
    cfg = smoke_config("modpo", tmp_path, base_model=str(folder), trust_remote_code=True)
    with pytest.raises(ConfigError, match="has its own code; allow it with --trust-remote-code"):
        planned(cfg, tmp_path / "a")
    assert not (tmp_path / "ran").exists()
    _, used = planned(cfg, tmp_path / "b", trust=True)
    assert (tmp_path / "ran").exists()
    assert used["trust_remote_code"]


def test_tokens_that_a_configuration_names_are_tokens_of_the_stand_in(tmp_path):
    cfg = smoke_config("modpo", tmp_path, base_model="some/model", **LORA)
    cfg |= {"special_tokens": {"eos_token": "<|eot_id|>", "additional_special_tokens": ["<a>", "<b>"]}}
    cfg |= {
        "tokenizer_type": "LlamaTokenizer",
        "added_tokens_overrides": {128041: "<c>"},
        "model_type": "Qwen2ForCausalLM",
    }
    cfg |= {"lora_target_linear": None, "lora_target_modules": ["c_attn"], "lora_modules_to_save": ["lm_head", "wte"]}
    made, used = planned(cfg, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(used["base_model"])
    assert [len(tokenizer.encode(token)) for token in ("<|eot_id|>", "<a>", "<b>")] == [1, 1, 1]
    assert not {"tokenizer_type", "added_tokens_overrides", "model_type", "lora_target_modules"} & set(used)
    assert used["lora_target_linear"] is True
    assert used["lora_modules_to_save"] == ["lm_head"]
    assert used["sequence_len"] == 2048
    said = "\n".join(made.lines())
    assert "lora_target_modules: ['c_attn'] -> removed (the tiny model has no such modules)" in said
    assert "a tokenizer of bytes with ChatML's template, since that of some/model is not available" in said


def test_local_margins_are_checked_as_they_are_and_lend_their_labels_and_betas(tmp_path, tokenizer):
    save_reward_model(tmp_path / "reward", tokenizer, ["kind", "true"])
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (tmp_path / "expert" / "mopo.json").write_text(json.dumps({"method": "modpo", "beta": 0.7}))
    margins = {
        "kind": {"source": "reward_model", "path": str(tmp_path / "reward"), "head": "true"},
        "expert": {"source": "adapter", "path": str(tmp_path / "expert")},
    }
    block = {"objective": "overall", "weights": {"overall": 0.5, "kind": 0.2, "expert": 0.3}, "margins": margins}
    _, used = planned(smoke_config("modpo", tmp_path, modpo=block, **LORA), tmp_path / "a")
    used = used["modpo"]["margins"]
    assert AutoConfig.from_pretrained(used["kind"]["path"]).id2label == {0: "kind", 1: "true"}
    assert json.loads((Path(used["expert"]["path"]) / "mopo.json").read_text())["beta"] == 0.7
    margins["kind"]["head"] = "honest"
    with pytest.raises(ConfigError, match="no score named 'honest'"):
        planned(smoke_config("modpo", tmp_path, modpo=block), tmp_path / "b")


def test_template_files_are_read_from_the_folder_of_the_configuration(tmp_path):
    (tmp_path / "all.jinja").write_text("Be {{ dimensions | join(' and ') }}.")
    block = {"dimensions": ["helpfulness"], "directives": {"integrated": {"file": str(tmp_path / "all.jinja")}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(smoke_config("amopo", tmp_path, amopo=block)))
    _, used = planned(tmp_path / "config.yaml", tmp_path / "a")
    assert used["amopo"]["directives"] == {"integrated": "Be {{ dimensions | join(' and ') }}."}


def test_keys_that_need_a_gpu_or_a_service_are_named_and_others_stay():
    gone = {
        "deepspeed": "zero3.json",
        "fsdp_config": {"a": 1},
        "fsdp_version": 2,
        "context_parallel_size": 2,
        "load_in_8bit": True,
        "wandb_project": "p",
        "use_mlflow": True,
        "hub_model_id": "a/b",
        "liger_rope": True,
        "lora_mlp_kernel": True,
        "flash_attention": True,
        "trust_remote_code": True,
        "use_ray": True,
        "unfrozen_parameters": ["layers.30"],
    }
    changed = {
        "bf16": "auto",
        "attn_implementation": "flash_attention_2",
        "optimizer": "paged_adamw_8bit",
        "plugins": ["axolotl_mopo.MOPOPlugin", "axolotl.integrations.liger.LigerPlugin"],
        "gradient_checkpointing": "offload",
    }
    kept = {
        "seed": 7,
        "learning_rate": 0.1,
        "activation_offloading": "hidden_states",
        "use_tensorboard": True,
        "adapter": "lora",
        "deepspeed_like": 1,
        "micro_batch_size": 1,
    }
    cfg, replaced = for_a_cpu({**gone, **changed, **kept}, trust=False)
    assert {each.key for each in replaced} == {*gone, *changed}
    assert not any(each.is_exercised for each in replaced)
    assert kept.items() <= cfg.items()
    assert not set(gone) & set(cfg)
    assert (cfg["attn_implementation"], cfg["optimizer"], cfg["bf16"]) == ("sdpa", "adamw_torch", False)
    assert cfg["plugins"] == ["axolotl_mopo.MOPOPlugin"]
    assert for_a_cpu({"trust_remote_code": True}, trust=True)[0]["trust_remote_code"]
    cfg, replaced = for_a_cpu({"micro_batch_size": 16, "load_in_4bit": False}, trust=False)
    assert [str(each) for each in replaced] == ["micro_batch_size: 16 -> 2 (a short step)"]
    assert cfg["load_in_4bit"] is False
