"""Two processes that talk by gloo, with DDP and with FSDP2, beside one process with the same global batch."""

import json
import re

import distributed_worker
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import LORA, ROOT, SMOKE, build_model, host_trainer, rare_token, save_adapter, twenty_steps
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from warm import ranks

POLICIES = {"full": {}, "lora": LORA}
METHODS = ["amopo", "modpo"]
LIMITS = {"amopo": 480, "modpo": 80}
"""With a limit of tokens now one and now the other process has more passes to make, or pairs to split."""
FSDP = [f"fsdp-{method}-{policy}" for method in METHODS for policy in POLICIES]
DDP = [f"ddp-{method}-{kind}" for method in METHODS for kind in (*POLICIES, "limited")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model on disk, with its tokenizer, and a whole model that was made of it."""
    folder = tmp_path_factory.mktemp("base")
    config = AutoConfig.from_pretrained(SMOKE / "model")
    config.tie_word_embeddings = False
    model = build_model(config)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(folder / "model")
    adapter = save_adapter(folder / "model", folder / "adapter", seed=1)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder / "merged")
    return folder


def configuration(base, folder, name, processes):
    """What a name such as `fsdp-modpo-lora` stands for, with a global batch of four."""
    kind, method, policy = name.split("-")
    block = yaml.safe_load((ROOT / "example_configs" / f"smoke-{method}.yaml").read_text())[method]
    if method == "amopo":
        block["weighting"] = "uniform"
    if policy == "limited":
        block["max_tokens_per_pass"] = LIMITS[method]
    if kind == "fsdp" and method == "modpo":
        margin = {"source": "adapter", "path": str(base / "merged"), "reference": str(base / "model"), "beta": 0.2}
        block["margins"]["safer"], block["weights"]["safer"] = margin, 0.2
    if method == "modpo":
        block["cache_dir"] = str(folder / f"cache-{name}-{processes}")
    return twenty_steps(
        method,
        folder / f"{name}-{processes}",
        processes,
        base_model=str(
            base / "model"
        ),  # its shape only: Axolotl cannot load weights in several processes without a GPU
        dataset_prepared_path=str(folder / "prepared"),
        **{method: block},
        **POLICIES.get(policy, {}),
    )


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Results of all runs by name, of one process and of two; those of two share their processes."""
    folder = tmp_path_factory.mktemp("distributed")
    jobs = []
    for name in DDP + FSDP:
        distributed_worker.train(configuration(base, folder, name, 1), str(folder / f"{name}-1.pt"))
        cfg = configuration(base, folder, name, 2)
        jobs.append({"cfg": cfg, "result": str(folder / f"{name}-2.pt"), "sharded": name in FSDP})
    poisoned = {**configuration(base, folder, "ddp-amopo-full", 2), "max_steps": 30, "logging_steps": 30}
    jobs.append({"cfg": poisoned, "result": str(folder / "poisoned"), "poison": rare_token(host_trainer(poisoned))[0]})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ranks("distributed_worker.py", folder / "jobs.json", env={"ACCELERATE_USE_CPU": "true"})
    return folder


def results(runs, name):
    return [torch.load(runs / f"{name}-{processes}.pt", weights_only=True) for processes in (1, 2)]


def ran(runs, name):
    return [json.loads((runs / f"{name}-2.pt.ran{rank}").read_text()) for rank in (0, 1)]


def losses(result):
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("name", DDP)
def test_ddp_trains_as_one_process_does(runs, name):
    one, two = results(runs, name)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    assert len(losses(one)) == 20
    for entry, other in zip(one["log"], two["log"], strict=True):
        for key in entry.keys() - {"epoch", "total_flos"}:
            if not key.endswith(("runtime", "per_second", "time")):
                assert entry[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    for key, parameter in one["parameters"].items():
        assert torch.allclose(parameter, two["parameters"][key], atol=1e-4), key
    if name.endswith("limited"):
        ours, theirs = (each["groups"] for each in ran(runs, name))
        assert {sum(a) > sum(b) for a, b in zip(ours, theirs, strict=True) if sum(a) != sum(b)} == {True, False}
        if "amopo" in name:
            split = {(max(a) > 1, max(b) > 1) for a, b in zip(ours, theirs, strict=True)}
            assert split >= {(True, False), (False, True)}


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("name", ["ddp-modpo-full", "ddp-modpo-lora"])
def test_constants_are_computed_once_and_split_over_the_ranks(runs, name):
    tables, checked = 2, 4  # one for the training rows and one for evaluation; a few rows are held against them
    whole = (101, 21)
    for each in ran(runs, name):
        assert each["before"] == sum(-(-rows // 2) for rows in whole) + checked
    assert len(list((runs / f"cache-{name}-2").glob("*.safetensors"))) == tables
    one, two = results(runs, name)
    for sets in ("train", "evaluation"):
        for table, other in zip(one["constants"][sets], two["constants"][sets], strict=True):
            assert torch.allclose(table, other, atol=1e-4)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("name", FSDP)
def test_fsdp2_trains_as_one_process_does(runs, base, name):
    one, two = results(runs, name)
    assert losses(one) == pytest.approx(two["losses"], rel=1e-5)
    *_, evaluated = (entry["eval_loss"] for entry in one["log"] if "eval_loss" in entry)
    assert evaluated == pytest.approx(two["eval_loss"], rel=1e-4)
    for sets, (reference, margins) in one["constants"].items():
        sharded_reference, sharded_margins = two["constants"][sets]
        assert torch.allclose(reference, sharded_reference, atol=1e-4)
        assert torch.allclose(margins, sharded_margins, atol=1e-4)
        assert margins[..., -1].std() > 0.01


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("name", FSDP)
def test_checkpoints_of_a_sharded_run_load_in_one_process(runs, base, name):
    one, _ = results(runs, name)
    folder = runs / f"{name}-2.pt.model"
    if name.endswith("lora"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "model"), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = dict(model.named_parameters())
    for key, parameter in one["parameters"].items():
        assert torch.allclose(parameter, loaded[key], atol=1e-4), key
    shards = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    dcp.load(shards, checkpoint_id=f"{runs / name}-2.pt.shards", no_dist=True)
    assert all(torch.equal(shards[key], loaded[key]) for key in one["parameters"])


@pytest.mark.xdist_group("distributed")
def test_a_bad_loss_on_one_rank_stops_all(runs, base):
    _, row = rare_token(host_trainer(configuration(base, runs, "ddp-amopo-full", 2)))
    errors = [(runs / f"poisoned.error{rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert row in map(int, re.findall(r"(\d+) \(chosen", errors[0]))
