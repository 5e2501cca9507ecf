"""Axolotl's features with both methods. Each test checks an effect that is missing if the feature is ignored."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import LORA, SMOKE, build_model, host_trainer, smoke_config
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_config import AMOPO, MODPO, changed, refusal
from test_pairing import helpsteer_rows
from test_trainers import FIXED, assert_same_gradients, first_step, training_logs
from transformers import AutoConfig
from warm import python

METHODS = ["amopo", "modpo"]
SMALL = {
    "max_steps": 2,
    "warmup_steps": 0,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "test_datasets": None,
    "dataset_num_proc": 0,
    "dataloader_num_workers": 0,
}


@pytest.fixture
def write(tmp_path, prepared):
    """A method's smoke YAML with some keys replaced, as a mapping."""

    def write(method, name="run", **overrides):
        periods = {key: overrides.pop(key) for key in ("evals_per_epoch", "saves_per_epoch") if key in overrides}
        settings = {"dataset_prepared_path": str(prepared), **SMALL, **overrides}
        cfg = {**smoke_config(method, tmp_path / name, **settings), **periods}
        if "datasets" not in overrides:
            cfg["datasets"][0]["path"] = str(SMOKE / "pairs-test.jsonl")  # the smaller one
        return cfg

    return write


@pytest.fixture
def build(write):
    """The trainer that Axolotl builds from it."""

    def build(method, name="run", **overrides):
        random.seed(0)
        torch.manual_seed(0)  # Axolotl does not seed random initial weights
        return host_trainer(write(method, name, **overrides))

    return build


@pytest.fixture
def on_disk(tmp_path, tokenizer):
    """A base model whose weights are on disk, which are read as they are."""
    # Four-bit weights come in blocks of 64.
    build_model(AutoConfig.from_pretrained(SMOKE / "model", intermediate_size=128)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return {"base_model": str(tmp_path / "base"), "reinit_weights": None}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Axolotl's command line, in this process."""
    from axolotl.cli.main import cli

    def command(name, cfg, **options):
        monkeypatch.setattr(sys, "argv", ["axolotl"])  # Axolotl parses it again
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(cfg))
        done = CliRunner().invoke(cli, [name, str(path), "--launcher", "python"], catch_exceptions=False, **options)
        assert done.exit_code == 0, done.output
        return done.output

    return command


def snapshot(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moved(trainer, before):
    """The parameters whose bits are others; four-bit weights are stored in a type whose NaN are none."""
    now = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return {name for name, p in now.items() if not torch.equal(p.view(torch.uint8), before[name].view(torch.uint8))}


def state_of(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())


def losses(trainer):
    return [entry["loss"] for entry in training_logs(trainer)]


@pytest.mark.parametrize("method", METHODS)
def test_dora_trains_its_magnitudes(build, method):
    trainer = build(method, peft_use_dora=True, **LORA)
    before = snapshot(trainer)
    trainer.train()
    magnitudes = {name for name in before if "lora_magnitude_vector" in name}
    assert magnitudes
    assert magnitudes <= moved(trainer, before)
    assert all("lora_" in name for name in moved(trainer, before))


@pytest.mark.parametrize("method", METHODS)
def test_rslora_scales_by_the_root_of_the_rank(build, method):
    trainer = build(method, peft_use_rslora=True, **LORA)
    trainer.train()
    scales = {m.scaling["default"] for m in trainer.model.modules() if hasattr(m, "lora_A")}
    assert scales == {8 / math.sqrt(4)}


@pytest.mark.parametrize("method", METHODS)
def test_whole_modules_are_trained_beside_an_adapter(build, method):
    trainer = build(method, lora_modules_to_save=["embed_tokens", "lm_head"], **LORA)
    before = snapshot(trainer)
    trainer.train()
    whole = {name for name in moved(trainer, before) if "lora_" not in name}
    assert {name.split(".")[-4] for name in whole} == {"embed_tokens", "lm_head"}
    assert all("modules_to_save" in name for name in whole)


@pytest.mark.parametrize("method", METHODS)
def test_qlora_trains_adapters_of_weights_of_four_bits(build, on_disk, method):
    trainer = build(method, **{**LORA, "adapter": "qlora", "load_in_4bit": True}, **on_disk)
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    before = snapshot(trainer)
    trainer.train()
    assert moved(trainer, before)
    assert all("lora_" in name for name in moved(trainer, before))


@pytest.mark.parametrize("method", METHODS)
def test_reentrant_checkpointing_changes_no_gradient(build, method):
    _, gradients = first_step(build(method, "plain", **FIXED[method]))
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = build(method, "reentrant", **reentrant, **FIXED[method])
    _, other = first_step(trainer)
    assert trainer.model.is_gradient_checkpointing
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert_same_gradients(gradients, other)


def test_offloading_what_checkpoints_keep_changes_no_gradient(build):
    _, gradients = first_step(build("modpo", "plain"))
    trainer = build("modpo", "offloading", gradient_checkpointing=True, activation_offloading="hidden_states")
    _, other = first_step(trainer)
    seen = trainer.activation_offload_context.stats
    assert seen.marked_tensors == trainer.model.config.num_hidden_layers
    assert seen.skipped_marked_tensors == seen.marked_tensors  # they are on the CPU already
    assert_same_gradients(gradients, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_has_the_same_losses(build, monkeypatch, method):
    """Traced and differentiated as for any backend, but run without generated code, which takes minutes to make."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # Axolotl sets it; monkeypatch restores it afterwards
    plain = build(method, "plain", **FIXED[method])
    plain.train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = build(method, "compiled", torch_compile=True, torch_compile_backend="aot_eager", **FIXED[method])
    trainer.train()
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] > 0
    torch._dynamo.reset()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-4)


KERNELS = """
import json, random, sys
from pathlib import Path
import axolotl.kernels.lora
import torch
sys.path.insert(0, "tests")
from conftest import LORA, SMOKE, build_model, host_trainer, save_adapter, smoke_config, stir
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
alone = {"dataset_num_proc": 0, "dataloader_num_workers": 0}
common = {"max_steps": 2, "warmup_steps": 0, "test_datasets": None, **alone, **LORA}

def seeded_trainer(cfg):
    random.seed(0)
    torch.manual_seed(0)
    return host_trainer(cfg)

def trained(method, kernels):
    kernel = {"lora_qkv_kernel": kernels, "lora_o_kernel": kernels}
    trainer = seeded_trainer(smoke_config(method, folder, **common, **kernel))
    trainer.train()
    patched = hasattr(trainer.model.base_model.model.model.layers[0].self_attn, "apply_qkv")
    losses[f"{method} {patched}"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

def save_margins():
    build_model(AutoConfig.from_pretrained(SMOKE / "model")).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(folder / "base")
    save_adapter(folder / "base", folder / "part", seed=1)
    everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=everywhere, use_dora=True, lora_dropout=0.2, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    stir(model).save_pretrained(folder / "all")

def computed(kernels):
    margins = {name: {"source": "adapter", "path": str(folder / name), "beta": 0.2} for name in ("part", "all")}
    block = {"objective": "overall", "weights": {"overall": 0.5, "part": 0.5, "all": 0.5}, "margins": margins}
    block["cache_dir"] = str(folder / f"cache {kernels}")
    kernel = dict.fromkeys(["lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel"], kernels)
    on_disk = {"base_model": str(folder / "base"), "reinit_weights": None, "dataset_prepared_path": str(folder / "few")}
    cfg = smoke_config("modpo", folder, **{**common, **on_disk}, modpo=block, **kernel)
    cfg["datasets"][0]["split"] = "train[:24]"
    trainer = seeded_trainer(cfg)
    stir(trainer.model)
    layer = trainer.model.base_model.model.model.layers[0]
    assert hasattr(layer.self_attn, "apply_qkv") is ("forward" in vars(layer.mlp)) is kernels
    trainer.precompute(trainer.model)
    return [part.tolist() for part in trainer._constants["train"]]

# Stands in for a kernel that needs a GPU.
axolotl.kernels.lora.swiglu_forward = lambda gate, up: torch.nn.functional.silu(gate) * up
save_margins()
losses, tables = {}, {}
for kernels in (False, True):  # they stay in the model's classes
    for method in ("amopo", "modpo"):
        trained(method, kernels)
    tables[str(kernels)] = computed(kernels)
(folder / "results.json").write_text(json.dumps({"losses": losses, "tables": tables}))
"""


@pytest.fixture(scope="module")
def beside_kernels(tmp_path_factory):
    """The results of a subprocess with and without Axolotl's kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    done = python("-c", KERNELS, folder)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "results.json").read_text())


def test_the_hosts_kernels_of_attention_adapters_have_the_same_losses(beside_kernels):
    losses = beside_kernels["losses"]
    assert set(losses) == {f"{method} {patched}" for method in METHODS for patched in (True, False)}
    for method in METHODS:
        assert losses[f"{method} True"] == pytest.approx(losses[f"{method} False"], rel=1e-4)


def test_beside_the_hosts_kernels_a_margin_adapter_has_the_same_rewards(beside_kernels):
    plain, kernels = ([torch.tensor(part) for part in beside_kernels["tables"][name]] for name in ("False", "True"))
    for one, other in zip(plain, kernels, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert plain[1].abs().amax((0, 1)).min() > 1


@pytest.mark.parametrize(
    ("optimizer", "name", "schedule", "rates"),
    [("adafactor", "Adafactor", "constant", [1, 1, 1]), ("adopt_adamw", "ADOPT", "linear", [1, 2 / 3, 1 / 3])],
)
@pytest.mark.parametrize("method", METHODS)
def test_other_optimizers_and_schedules(build, method, optimizer, name, schedule, rates):
    trainer = build(method, optimizer=optimizer, lr_scheduler=schedule, max_steps=3)
    before = snapshot(trainer)
    trainer.train()
    assert name in type(trainer.optimizer.optimizer).__name__
    assert len(moved(trainer, before)) == len(before)
    logged = [entry["learning_rate"] for entry in training_logs(trainer)]
    assert logged == pytest.approx([0.002 * rate for rate in rates])


@pytest.mark.parametrize("when", [{"eval_steps": 2}, {"evals_per_epoch": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_held_out_pairs_are_evaluated_when_asked(build, method, when):
    held_out = smoke_config(method, Path())["test_datasets"]
    trainer = build(method, max_steps=4, test_datasets=held_out, **when)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    assert all("eval_rewards/margins" in entry for entry in logged)
    assert len(trainer.eval_dataset) == 40


@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_the_training_pairs_is_held_out(build, method):
    trainer = build(method, val_set_size=0.1, eval_steps=2)
    trainer.train()
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (36, 4)
    assert "eval_rewards/accuracies" in trainer.state.log_history[-2]


@pytest.mark.parametrize("method", METHODS)
def test_training_stops_early_and_the_best_model_is_loaded(build, method):
    """The worst evaluation counts as the best, so that the first one stays the best."""
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "early_stopping_patience": 1}
    every = {"save_strategy": None, "save_steps": 1, "eval_steps": 1, "val_set_size": 0.1}
    trainer = build(method, max_steps=6, learning_rate=0.01, **best, **every)
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    del evaluated[0]
    best = max(evaluated, key=evaluated.get)
    assert trainer.state.global_step == best + 1 < 6
    checkpoint = Path(trainer.state.best_model_checkpoint)
    assert checkpoint.name == f"checkpoint-{best}"
    names = dict(trainer.model.named_parameters())
    for name, weights in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(names[name], weights), name


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_what_was_asked_for(build, method):
    trainer = build(method, max_steps=3, save_strategy=None, save_steps=1, save_only_model=True, save_total_limit=2)
    trainer.train()
    checkpoints = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert [checkpoint.name for checkpoint in checkpoints] == ["checkpoint-2", "checkpoint-3"]
    for checkpoint in checkpoints:
        assert (checkpoint / "model.safetensors").exists()
        assert (checkpoint / "mopo.json").exists()
        assert not (checkpoint / "optimizer.pt").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_started_again_goes_on(command, write, method):
    cfg = write(method, save_strategy=None, save_steps=2, auto_resume_from_checkpoints=True)
    command("train", cfg)
    first = state_of(Path(cfg["output_dir"]) / "checkpoint-2")
    command("train", {**cfg, "max_steps": 4})
    second = state_of(Path(cfg["output_dir"]) / "checkpoint-4")
    assert second["log_history"][:2] == first["log_history"][:2]
    assert [entry["step"] for entry in second["log_history"] if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_model_answers_a_prompt(command, write, on_disk, tokenizer, method):
    # Axolotl removes `rl` for inference, and would then enable kernels that need a GPU.
    kernels = dict.fromkeys(["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"], False)
    cfg = write(method, **on_disk, **LORA, **kernels)
    command("train", cfg)
    output = command("inference", cfg, input="What is 2 plus 3?")
    answer = output.rpartition("What is 2 plus 3?")[2]
    assert len(tokenizer(answer).input_ids) > 10


@pytest.mark.parametrize("method", METHODS)
def test_data_sets_of_several_types_are_trained_together(build, tmp_path, method):
    path = tmp_path / "rated.jsonl"
    path.write_text("\n".join(map(json.dumps, helpsteer_rows(60))))
    rated = {"path": str(path), "ds_type": "json", "type": "axolotl_mopo.helpsteer2", "objective": "overall"}
    pairs = smoke_config(method, tmp_path)["datasets"][0]
    block = {"amopo": {"dimensions": ["helpfulness", "correctness"]}} if method == "amopo" else {}
    counts = [
        len(build(method, str(number), datasets=entries, **block).train_dataset)
        for number, entries in enumerate(([pairs], [rated], [pairs, rated]))
    ]
    assert counts[0] == 320
    assert counts[1] > 10
    assert counts[2] == counts[0] + counts[1]


@pytest.mark.parametrize("method", METHODS)
def test_new_tokens_are_in_the_prompts_and_in_the_model(build, tmp_path, method):
    trainer = build(method, tokens=["minutes"], dataset_prepared_path=str(tmp_path / "prepared"))
    (new,) = trainer.processing_class("minutes", add_special_tokens=False).input_ids
    assert new == 1024
    assert trainer.model.get_input_embeddings().num_embeddings > new
    assert trainer.model.get_output_embeddings().out_features > new
    prompts = trainer.train_dataset["prompt_input_ids"]
    with_it = [prompt for prompt in prompts if any(new in ids for ids in prompt)]
    texts = [trainer.processing_class.decode(prompt[0]) for prompt in prompts]
    assert len(with_it) == sum("minutes" in text for text in texts) > 0
    trainer.train()


@pytest.mark.parametrize("method", METHODS)
def test_another_padding_token(build, method):
    block = smoke_config(method, Path())[method]
    trainer = build(method, special_tokens={"pad_token": "<|pad|>"}, **{method: {**block, "layout": "padded"}})
    assert trainer.processing_class.pad_token == "<|pad|>"
    batch = next(iter(trainer.get_train_dataloader()))
    assert any((part["input_ids"] == 1024).any() for unit in batch["groups"] for part in unit)
    trainer.train()


@pytest.mark.parametrize("method", METHODS)
def test_a_token_with_another_name_and_a_template_that_uses_it(build, method):
    template = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )
    overrides = {"added_tokens_overrides": {1: "<|turn|>"}, "chat_template": "jinja"}
    trainer = build(method, chat_template_jinja=template, **overrides)
    for prompts in trainer.train_dataset["prompt_input_ids"]:
        for ids in prompts:
            assert (ids[0], ids.count(1)) == (1, 2)
            # Where the space and the first word of an answer are one token, it belongs to the answer.
            assert trainer.processing_class.decode(ids).endswith(("<|turn|>assistant: ", "<|turn|>assistant:"))
    trainer.train()


@pytest.mark.parametrize("method", METHODS)
def test_a_last_batch_that_is_not_full_is_dropped(build, method):
    kept, dropped = (build(method, str(drop), micro_batch_size=7, dataloader_drop_last=drop) for drop in (None, True))
    assert (len(kept.get_train_dataloader()), len(dropped.get_train_dataloader())) == (6, 5)


@pytest.mark.parametrize("base", [AMOPO, MODPO], ids=METHODS)
@pytest.mark.parametrize("key", ["neftune_noise_alpha", "pad_to_sequence_len", "eval_table_size", "relora"])
def test_what_the_host_leaves_out_of_preference_runs_is_refused(base, key):
    assert f"`{key}` has no effect with `rl: {base['rl']}`" in refusal(changed(base, **{key: 5}))


@pytest.mark.parametrize("base", [AMOPO, MODPO], ids=METHODS)
@pytest.mark.parametrize("key", ["cut_cross_entropy", "chunked_cross_entropy", "liger_fused_linear_cross_entropy"])
def test_kernels_of_another_loss_are_refused(base, key):
    assert "whose loss is not a cross-entropy" in refusal(changed(base, **{key: True}))


@pytest.mark.parametrize("method", METHODS)
def test_the_hosts_packing_is_refused_by_the_host(build, method):
    with pytest.raises(ValueError, match="`sample_packing: true` does not work with RLHF training"):
        build(method, sample_packing=True)


@pytest.mark.parametrize("method", METHODS)
def test_trackers_get_the_methods_metrics(build, tmp_path, monkeypatch, method):
    import wandb

    # Axolotl sets the first two itself; monkeypatch restores them afterwards.
    for name, value in {"WANDB_MODE": "offline", "WANDB_PROJECT": "mopo", "WANDB_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    trackers = {"use_wandb": True, "wandb_project": "mopo", "wandb_mode": "offline", "use_tensorboard": True}
    trainer = build(method, val_set_size=0.1, eval_steps=2, **trackers)
    trainer.train()
    kept = set(wandb.run.summary.keys())
    assert Path(wandb.run.settings.sync_file).stat().st_size > 0
    wandb.finish()
    own = "weights/integrated" if method == "amopo" else "margins/correctness"
    assert {f"train/{name}" for name in ("rewards/margins", own)} <= kept
    (events,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events.parent)).Reload()
    assert {f"{part}/{name}" for part in ("train", "eval") for name in ("rewards/margins", own)} <= set(
        scalars.Tags()["scalars"]
    )
    logged = [entry["rewards/margins"] for entry in training_logs(trainer)]
    assert [event.value for event in scalars.Scalars("train/rewards/margins")] == pytest.approx(logged)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_of_ray_trains(write, method):
    """Axolotl's command requests a GPU from Ray; here Ray starts its worker on a CPU."""
    ray = pytest.importorskip("ray")
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import ray_train_func
    from axolotl.utils.dict import DictDefault
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cfg = load_cfg(DictDefault(write(method, use_ray=True, ray_num_workers=1, save_strategy=None, save_steps=2)))
    TorchTrainer(
        ray_train_func,
        train_loop_config={"cfg": cfg.to_dict(), "cli_args": TrainerCliArgs()},
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False),
        run_config=RunConfig(storage_path=cfg.output_dir),
    ).fit()
    ray.shutdown()
    assert json.loads((Path(cfg.output_dir) / "mopo.json").read_text())["method"] == method
    history = state_of(Path(cfg.output_dir) / "checkpoint-2")["log_history"]
    assert "rewards/margins" in history[0]
