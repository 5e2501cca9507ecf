"""DeepSpeed ZeRO and FSDP2 by Axolotl's own train command on two CPU processes, beside one with the same batches."""

import json
import re
import socket

import pytest
import torch
import yaml
from conftest import LORA, ROOT, SMOKE, build_model, save_adapter, save_reward_model, twenty_steps
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from warm import python, ranks

pytestmark = [pytest.mark.sharded, pytest.mark.xdist_group("sharded")]

STRATEGIES = ["zero1", "zero2", "zero3", "fsdp2"]
METHODS = ["amopo", "modpo"]
POLICIES = {"full": {}, "lora": LORA}
LIMITS = {"amopo": 480, "modpo": 80}
"""With a limit of tokens now one and now the other process has more passes to make, or pairs to split."""
MATRIX = [f"{s}-{m}-{p}" for s in STRATEGIES for m in METHODS for p in POLICIES]
EXACT = [f"{s}-{m}-full-fp32" for s in ("zero2", "zero3", "fsdp2") for m in METHODS]
LIMITED = [f"{s}-{m}-full-limited" for s in ("zero3", "fsdp2") for m in METHODS]
RESUMED = [f"{s}-modpo-{p}" for s in STRATEGIES for p in POLICIES]

PLAIN = {"ACCELERATE_TORCH_DEVICE": "cpu", "WORLD_SIZE": "1", "RANK": "0"}
ENVIRONMENTS = {
    **{f"zero{stage}": {"ACCELERATE_USE_DEEPSPEED": "true"} for stage in (1, 2, 3)},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "one": {},
}
"""What `axolotl train` has its launcher set."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model whose weights are on disk in bf16, a whole model made of it, and a reward model."""
    folder = tmp_path_factory.mktemp("base")
    config = AutoConfig.from_pretrained(SMOKE / "model")
    config.tie_word_embeddings = False
    model = build_model(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(SMOKE / "model")
    tokenizer.save_pretrained(folder / "model")
    adapter = save_adapter(folder / "model", folder / "adapter", seed=1)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder / "merged")
    save_reward_model(folder / "reward", tokenizer, ["good"])
    return folder


def configuration(base, folder, name, **changes):
    """What a name such as `zero3-modpo-lora` stands for, with a global batch of four."""
    strategy, method, policy, *more = name.split("-")
    block = yaml.safe_load((ROOT / "example_configs" / f"smoke-{method}.yaml").read_text())[method]
    if method == "amopo":
        block["weighting"] = "uniform"
    else:
        whole = {"source": "adapter", "path": str(base / "merged"), "reference": str(base / "model"), "beta": 0.2}
        judge = {"source": "reward_model", "path": str(base / "reward"), "dtype": "float32", "scale": 20}
        block["margins"] |= {"safer": whole, "good": judge}
        block["weights"] |= {"safer": 0.2, "good": 0.1}
        block["cache_dir"] = str(folder / f"cache-{name}")
    if "limited" in more:
        block["max_tokens_per_pass"] = LIMITS[method]
    cfg = twenty_steps(
        method,
        folder / name,
        1 if strategy == "one" else 2,
        base_model=str(base / "model"),
        reinit_weights=None,
        bf16="fp32" not in more,
        dataset_prepared_path=str(base / "prepared"),
        **{method: block},
        **POLICIES[policy],
    )
    if policy == "full" and cfg["bf16"]:
        # One process keeps its weights in bf16, where small steps are lost; DeepSpeed and FSDP2 keep them in float32.
        cfg["learning_rate"] = 0.00005
    if strategy == "fsdp2":
        cfg["fsdp_version"] = 2
        cfg["fsdp_config"] = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            # accelerate writes one rank's part of an adapter into a full checkpoint.
            "state_dict_type": "SHARDED_STATE_DICT" if policy == "lora" else "FULL_STATE_DICT",
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": True,
        }
    elif strategy != "one":
        automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        settings = dict.fromkeys((*automatic, "gradient_clipping"), "auto")
        settings["zero_optimization"] = {"stage": int(strategy[-1])}
        if strategy == "zero3":
            settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        settings |= {"zero_allow_untested_optimizer": True, "bf16": {"enabled": cfg["bf16"]}}
        cfg["deepspeed"] = str(folder / f"{name}.json")
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return cfg | changes


def job(base, folder, name, result=None, kill_at=None, **changes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])  # rank 0 serves a store of the job's own
    environment = {**ENVIRONMENTS[name.partition("-")[0]], "ACCELERATE_TORCH_DEVICE": "cpu", "MASTER_PORT": port}
    cfg = configuration(base, folder, name, **changes)
    result = str(folder / f"{result or name}.pt")
    return {"cfg": cfg, "result": result, "environment": environment, "kill_at": kill_at}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory, request):
    """Results of the runs that the selected tests need, those of two processes and those of one."""
    folder = tmp_path_factory.mktemp("sharded")
    wanted = {}
    for item in request.session.items:
        if item.get_closest_marker("sharded"):
            wanted.setdefault(item.originalname, []).append(item.callspec.params["name"])
    names = sorted({name for names in wanted.values() for name in names})
    resumed = wanted.get("test_a_killed_run_finds_its_reference_again", [])
    jobs = []
    for name in names:
        saves = {"save_strategy": "steps", "save_steps": 10} if name in resumed else {}
        jobs.append(job(base, folder, name, **saves))
        if name in resumed:
            output = {"output_dir": str(folder / f"{name}-killed"), **saves}
            jobs.append(job(base, folder, name, f"{name}-killed", kill_at=10, **output))
            again = {"resume_from_checkpoint": str(folder / f"{name}-killed" / "checkpoint-10")}
            jobs.append(job(base, folder, name, f"{name}-resumed", **output, **again))
    (folder / "alone.json").write_text(json.dumps([job(base, folder, name) for name in sorted(set(map(alone, names)))]))
    done = python(ROOT / "tests" / "sharded_worker.py", folder / "alone.json", env=PLAIN, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    own_store = {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    ranks("sharded_worker.py", folder / "jobs.json", env=own_store, timeout=3000)
    return folder


def alone(name):
    """The run of one process with the same numbers."""
    _, *rest = name.split("-")
    return "-".join(["one", *(part for part in rest if part != "limited")])


def result(runs, name, processes=2):
    for rank in range(processes):
        code = (runs / f"{name}.pt.exit{rank}").read_text()
        assert code == "0", (runs / f"{name}.pt.log{rank}").read_text()[-6000:]
    return torch.load(runs / f"{name}.pt", weights_only=True)


def losses(found):
    return [entry["loss"] for entry in found["log"] if "loss" in entry]


def tolerances(name):
    """Relative, of losses; absolute, of log-probs of completions, by the dtype that the run computes in."""
    return (1e-4, 1e-3) if name.endswith("fp32") else (0.03, 2.0)


@pytest.mark.parametrize("name", MATRIX + EXACT + LIMITED)
def test_a_sharded_run_trains_as_one_process_does(runs, base, name):
    two, one = result(runs, name), result(runs, alone(name), 1)
    of_losses, of_logps = tolerances(name)
    assert len(losses(two)) == 20
    assert losses(two) == pytest.approx(losses(one), rel=of_losses)
    assert "packed prefix trees" in (runs / f"{name}.pt.log0").read_text()
    for sets, (reference, margins) in one["constants"].items():
        sharded_reference, sharded_margins = two["constants"][sets]
        assert torch.allclose(reference, sharded_reference, atol=of_logps)
        assert torch.allclose(margins, sharded_margins, atol=of_logps)
        assert (margins[..., 1:].std(dim=(0, 1)) > 0.01).all()  # the models' own


@pytest.mark.parametrize("name", MATRIX)
def test_what_a_sharded_run_leaves_loads_in_one_process(runs, base, name):
    result(runs, name)
    output = runs / name / "out"
    assert json.loads((output / "mopo.json").read_text())["method"] == name.split("-")[1]
    model = AutoModelForCausalLM.from_pretrained(base / "model" if name.endswith("lora") else output)
    before = AutoModelForCausalLM.from_pretrained(base / "model")
    if name.endswith("lora"):
        model = PeftModel.from_pretrained(model, output)
        assert all(p.any() for key, p in model.named_parameters() if "lora_B" in key)
    else:
        moved = dict(model.named_parameters())
        assert all(p.shape == moved[key].shape for key, p in before.named_parameters())
        assert not torch.equal(before.lm_head.weight, model.lm_head.weight)
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_finds_its_reference_again(runs, name):
    whole, resumed = result(runs, name), result(runs, f"{name}-resumed")
    said = (runs / f"{name}-resumed.pt.log0").read_text()
    assert "computed for" not in said
    assert re.search(r"Reference, train: found for 101 pairs", said)
    assert losses(resumed)[-10:] == pytest.approx(losses(whole)[-10:], rel=1e-3)
    for sets, tables in whole["constants"].items():
        for table, other in zip(tables, resumed["constants"][sets], strict=True):
            assert torch.equal(table, other)
