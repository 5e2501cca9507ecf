"""The real `axolotl` command on the smoke configs: train, sweep, preprocess, and what they leave on disk."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, SMOKE, axolotl, build_model, smoke_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_pairing import helpsteer_rows
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)
from warm import AXOLOTL

import axolotl_mopo
from axolotl_mopo.config import Directives


def cold(*arguments):
    """What `axolotl` writes when it is run as a user runs it, in a new process that imports everything itself."""
    path = f"{AXOLOTL.parent}{os.pathsep}{os.environ['PATH']}"
    command = [AXOLOTL, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=600
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    return output


def log_history(output_dir):
    (checkpoint,) = output_dir.glob("checkpoint-*")
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def check_run(output_dir, method):
    """A model that loads, a card that says the method, finite metrics, and a loss that went down."""
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 plus 3?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    card = ModelCard.load(output_dir / "README.md")
    assert {"axolotl", method} <= set(card.data.tags)
    assert f"rl: {method}" in card.text
    assert {"amopo": "liu2025amopo", "modpo": "zhou2024modpo"}[method] in card.text
    assert "mopo_tree" not in (output_dir / "config.json").read_text()
    history = log_history(output_dir)
    for entry in history:
        assert all(abs(value) < 1e9 for value in entry.values())
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    return history


def check_manifest(output_dir, method):
    """`mopo.json` beside the model and beside its checkpoint: the method, and how to ask the model."""
    (checkpoint,) = output_dir.glob("checkpoint-*")
    manifest = json.loads((output_dir / "mopo.json").read_text())
    for folder in (output_dir, checkpoint):
        assert (folder / "mopo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((checkpoint / "mopo.json").read_text()) == manifest
    assert manifest["method"] == method
    assert manifest["versions"]["axolotl-mopo"] == axolotl_mopo.__version__
    assert set(manifest["versions"]) >= {"axolotl", "torch", "transformers"}
    return manifest


def test_train_amopo(tmp_path):
    output = cold("train", "example_configs/smoke-amopo.yaml", "--output-dir", tmp_path / "out")
    assert "packed prefix trees" in output
    history = check_run(tmp_path / "out", "amopo")
    logged = {name for entry in history for name in entry}
    for name in ("integrated", "helpfulness", "correctness", "instruction_following"):
        assert {f"weights/{name}", f"rewards/margins/{name}", f"eval_rewards/accuracies/{name}"} <= logged
    manifest = check_manifest(tmp_path / "out", "amopo")
    assert manifest["dimensions"] == ["helpfulness", "correctness", "instruction_following"]
    assert manifest["score_range"] == [1, 5]
    assert manifest["directives"]["dimension"] == Directives().dimension
    directive = Directives().for_one("correctness", 5, manifest["dimensions"], (1, 5))
    assert manifest["inference"]["correctness"] == f"{directive}\n\n{{question}}"
    assert list(manifest["inference"]) == ["integrated", *manifest["dimensions"]]


def test_sweep_modpo(tmp_path):
    cfg = yaml.safe_load((ROOT / "example_configs" / "smoke-modpo.yaml").read_text())
    config = tmp_path / "modpo.yaml"
    config.write_text(yaml.safe_dump({**cfg, "output_dir": str(tmp_path / "out")}))
    axolotl("train", config, "--launcher", "python", "--sweep", "example_configs/smoke-modpo-sweep.yaml")
    sweep = yaml.safe_load((ROOT / "example_configs" / "smoke-modpo-sweep.yaml").read_text())["modpo.weights"]
    runs = sorted((tmp_path / "out").glob("sweep*"))
    trained = []
    for run in runs:
        check_run(run, "modpo")
        # In one process, Axolotl's model card collects the configs of all runs so far.
        config_in_card = (run / "README.md").read_text().split("```yaml\n")[-1].split("```")[0]
        trained.append(yaml.safe_load(config_in_card)["modpo.weights"])
        manifest = check_manifest(run, "modpo")
        assert (manifest["weights"], manifest["objective"]) == (trained[-1], "overall")
    assert sorted(trained, key=lambda weights: weights["overall"]) == sweep  # Axolotl shuffles a sweep
    compare(tmp_path, tmp_path / "out")
    front = json.loads((tmp_path / "compared" / "front.json").read_text())
    assert [policy["name"] for policy in front["policies"]] == [run.name for run in runs]
    assert [policy["weights"] for policy in front["policies"]] == trained
    assert any(policy["on_front"] for policy in front["policies"])
    embeddings = [load_file(run / "model.safetensors")["model.embed_tokens.weight"] for run in runs]
    assert not embeddings[0].equal(embeddings[1])
    assert not embeddings[1].equal(embeddings[2])


def compare(folder, *runs):
    """Generate, score and compare, by the real commands."""
    prompts, out = ROOT / "example_configs" / "smoke" / "pairs-test.jsonl", folder / "compared"
    generated = axolotl(
        "mopo", "generate", *runs, "--prompts", prompts, "--limit", 5, "--max-new-tokens", 8, "--out", out
    )
    assert "5 prompts" in generated
    scorers = ("--scorer", "brief=length:words", "--scorer", "letters=length:characters")
    assert "Scored brief, letters" in axolotl("mopo", "score", out, *scorers)
    assert "Hypervolume above" in axolotl("mopo", "front", out)
    for name in ("front.html", "front.png", "front.svg", "front.csv", "front.json"):
        assert (out / name).stat().st_size > 100


def test_modpo_from_prompts_and_two_reward_models_alone(tmp_path, tokenizer):
    """No preference data at all: responses of the base model, scored, paired, trained on, and compared with it."""
    base = tmp_path / "base"
    build_model(AutoConfig.from_pretrained(SMOKE / "model")).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, name in enumerate(("helpful", "harmless")):
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(**shape, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    prompts, drawn = ROOT / "example_configs" / "smoke" / "pairs.jsonl", tmp_path / "drawn"
    common = ("--prompts", prompts, "--limit", 12, "--samples", 3, "--max-new-tokens", 8)
    axolotl("mopo", "generate", base, *common, "--reference", "none", "--out", drawn)
    scorers = [
        f"{name}={{source: reward_model, path: {tmp_path / name}, dtype: float32}}" for name in ("helpful", "harmless")
    ]
    axolotl("mopo", "score", drawn, *(part for scorer in scorers for part in ("--scorer", scorer)))
    pairs = tmp_path / "pairs.jsonl"
    attributes = ("--attributes", "helpful,harmless", "--keep-unfinished")  # a tiny model never ends its turn
    arguments = ("--type", "responses", "--objective", "helpful", *attributes, "--output", pairs)
    summary = axolotl("mopo", "pairs", drawn / "responses" / "base.jsonl", *arguments)
    assert "36 rows read" in summary
    assert "How often two orders agree" in summary

    block = {
        "objective": "helpful",
        "weights": {"helpful": 0.5, "harmless": 0.5},
        "margins": {"harmless": {"source": "column"}},
    }
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    overrides = {"base_model": str(base), "reinit_weights": None, "test_datasets": None, "eval_steps": None, **lora}
    cfg = smoke_config("modpo", tmp_path, modpo=block, max_steps=2, **overrides)
    cfg["datasets"] = [{"path": str(pairs), "ds_type": "json", "type": "axolotl_mopo.pairs"}]
    (tmp_path / "modpo.yaml").write_text(yaml.safe_dump(cfg))
    axolotl("train", tmp_path / "modpo.yaml", "--launcher", "python")
    assert (tmp_path / "out" / "mopo.png").read_bytes().startswith(b"\x89PNG")
    compare(tmp_path, tmp_path / "out")
    policies = json.loads((tmp_path / "compared" / "front.json").read_text())["policies"]
    assert [(policy["name"], policy["kind"]) for policy in policies] == [("out", "policy"), ("reference", "reference")]
    assert policies[1]["kl"]["mean"] == 0


@pytest.fixture
def quick(tmp_path):
    """A config file of two steps, with its own folder of prepared rows."""

    def write(method, **overrides):
        cfg = smoke_config(method, tmp_path, max_steps=2, **overrides)
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(cfg))
        return path

    return write


def test_preprocess_then_train_with_lora_then_merge(quick, tmp_path):
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    base = tmp_path / "base"  # an adapter is merged into weights that are on disk
    build_model(AutoConfig.from_pretrained(SMOKE / "model")).save_pretrained(base)
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(base)
    config = quick("amopo", base_model=str(base), reinit_weights=None, **lora)
    assert "Success! Preprocessed data path" in axolotl("preprocess", config)
    assert "Loading prepared dataset from disk" in axolotl("train", config, "--launcher", "python")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    axolotl("merge-lora", config)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").num_parameters() > 0

    changed = quick("amopo", base_model=str(base), reinit_weights=None, amopo={"dimensions": ["helpfulness"]}, **lora)
    output = axolotl("train", changed, "--launcher", "python")
    assert "Loading prepared dataset from disk" not in output
    assert "Unable to find prepared dataset" in output


def test_the_workflow_with_an_adapter_as_margin(tmp_path):
    """DPO on one objective with Axolotl's own trainer, MODPO on the other with it as margin, a sweep, a merge."""
    base = tmp_path / "base"
    build_model(AutoConfig.from_pretrained(SMOKE / "model")).save_pretrained(base)
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(base)
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "max_steps": 2}
    common = {"base_model": str(base), "reinit_weights": None, "eval_steps": None, "test_datasets": None, **lora}

    pairs = ROOT / "example_configs" / "smoke" / "pairs.jsonl"
    exported = tmp_path / "safer.jsonl"
    axolotl("mopo", "pairs", pairs, "--type", "pairs", "--output", exported)
    first = smoke_config("modpo", tmp_path / "dpo", **common, rl="dpo", rl_beta=0.3, modpo=None, plugins=None)
    entry = {"path": str(exported), "ds_type": "json", "type": "chat_template.default", "field_messages": "prompt"}
    first["datasets"] = [entry]
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(first))
    axolotl("train", tmp_path / "dpo.yaml", "--launcher", "python")

    block = {
        "objective": "overall",
        "weights": {"overall": 0.5, "safer": 0.5},
        "margins": {"safer": {"source": "adapter", "path": first["output_dir"], "beta": first["rl_beta"]}},
    }
    second = smoke_config("modpo", tmp_path / "modpo", **{**common, "modpo": block})
    (tmp_path / "modpo.yaml").write_text(yaml.safe_dump(second))
    (tmp_path / "sweep.yaml").write_text("modpo.weights: [{overall: 0.9, safer: 0.1}, {overall: 0.5, safer: 0.5}]")
    output = axolotl("train", tmp_path / "modpo.yaml", "--launcher", "python", "--sweep", tmp_path / "sweep.yaml")
    assert output.count("Margin safer, train: computed") == output.count("Margin safer, train: found") == 1
    for name in ("sweep0001", "sweep0002"):
        run = Path(second["output_dir"]) / name
        assert json.loads((run / "mopo.json").read_text())["margins"]["safer"]["beta"] == 0.3
        assert not list(run.rglob("margin*"))
    merged = {"--lora-model-dir": run, "--output-dir": tmp_path / "merged"}
    axolotl("merge-lora", tmp_path / "modpo.yaml", *(part for pair in merged.items() for part in pair))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "merged").num_parameters() > 0


def test_changed_settings_never_train_on_rows_prepared_before(tmp_path):
    rows = helpsteer_rows(60)
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry = {"path": str(tmp_path / "raw.jsonl"), "ds_type": "json", "type": "axolotl_mopo.helpsteer"}
    block = {"dimensions": ["helpfulness", "correctness"]}
    changes = {
        "none": {"amopo": {**block, "beta": 0.5}},
        "dimensions": {"amopo": {"dimensions": ["correctness", "helpfulness"]}},
        "directive": {"amopo": {**block, "directives": {"integrated": "Be good at {{ dimensions | join(' and ') }}."}}},
        "score range": {"amopo": {**block, "score_range": [0, 10]}},
        "objective": {"datasets": [{**entry, "objective": "verbosity"}]},
    }

    def write(folder, **overrides):
        base = {"max_steps": 1, "datasets": [entry], "test_datasets": None, "eval_steps": None, "amopo": block}
        cfg = smoke_config("amopo", folder, **{**base, **overrides})
        (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
        return folder / "config.yaml"

    assert "Success! Preprocessed data path" in axolotl("preprocess", write(tmp_path))
    before = prepared_folders(tmp_path)

    def train(change):
        folder = tmp_path / change
        shutil.copytree(tmp_path / "prepared", folder / "prepared")
        output = axolotl("train", write(folder, **changes[change]), "--launcher", "python")
        return "Loading prepared dataset from disk" in output, prepared_folders(folder) - before

    with ThreadPoolExecutor(2) as pool:
        trained = dict(zip(changes, pool.map(train, changes), strict=True))
    assert trained.pop("none") == (True, set())
    for change, (served, new) in trained.items():
        assert not served, change
        assert len(new) == 1, change
    assert len({new.pop() for _, new in trained.values()}) == 4
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, rows[:40])))
    assert "Loading prepared dataset from disk" not in axolotl("train", write(tmp_path), "--launcher", "python")


def prepared_folders(folder):
    return {path.parent.name for path in (folder / "prepared").glob("*/dataset_info.json")}


def test_resume_and_evaluate(quick, tmp_path):
    config = quick("modpo", save_strategy=None, save_steps=1)
    axolotl("train", config, "--launcher", "python")
    last = tmp_path / "out" / "checkpoint-1"
    output = axolotl("train", config, "--launcher", "python", "--resume-from-checkpoint", last)
    assert "Resuming" in output or "resume" in output
    trained = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert trained["global_step"] == 2
    assert "eval_rewards/accuracies" in axolotl("evaluate", config, "--launcher", "python")


def test_a_config_error_stops_before_anything_is_loaded(quick):
    config = quick("amopo", amopo={"dimensions": ["helpfulness"], "betta": 1})
    output = axolotl("train", config, "--launcher", "python", fails=True)
    assert "`amopo.betta` is not a known key; did you mean `beta`?" in output
    assert "Loading model" not in output
    assert "Mapping RL Dataset" not in output


def test_the_tools_are_commands_of_axolotl(tmp_path):
    source = tmp_path / "raw.jsonl"
    source.write_text("\n".join(map(json.dumps, helpsteer_rows(40))))
    arguments = ("--type", "helpsteer", "--objective", "overall", "--output", tmp_path / "pairs.parquet")
    output = cold("mopo", "pairs", source, *arguments)
    assert "40 rows read" in output
    assert "How often two orders agree" in output
    assert (tmp_path / "pairs.parquet").exists()
    assert "a column, or a pattern" in " ".join(axolotl("mopo", "pairs", "--help").split())
