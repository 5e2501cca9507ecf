"""A policy that is sharded has a name of its weights, and models that rewards come from are whole beside it."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import CONFIGS, build_model, save_reward_model
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as zero

from axolotl_mopo.digests.weights import weights_digest
from axolotl_mopo.rewards import RewardModelSource
from axolotl_mopo.rewards.loading import load_whole
from axolotl_mopo.training.precompute import both_sides

SECOND_RANK = {"LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
ZERO_3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
NO_TURNS = {"chosen_turns": "[]", "rejected_turns": "[]"}
MESSAGES = '[{"role": "user", "content": "How are you?"}]'


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A group of one process, by which ZeRO-3 shards and transformers knows its rank."""
    AcceleratorState._reset_state(reset_partial_state=True)
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = request.param
    build_model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def second_rank(monkeypatch):
    """The environment of a rank whose policy gets its weights from the first."""
    for name, value in SECOND_RANK.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def zero_3(monkeypatch):
    """Transformers as Axolotl leaves it under ZeRO-3."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = zero.HfDeepSpeedConfig(ZERO_3)
    monkeypatch.setattr("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(zero, "is_deepspeed_zero3_enabled", lambda: True)
    yield config
    zero.unset_hf_deepspeed_config()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 3, 60]])).logits


def test_a_rank_whose_policy_comes_from_the_first_loads_weights_and_not_zeros(folder, second_rank):
    assert not any(parameter.any() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    loaded = logits(load_whole(AutoModelForCausalLM, str(folder), torch.float32))
    assert not any(parameter.any() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setenv("LOCAL_RANK", "0")
        assert torch.equal(loaded, logits(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_zero_3_a_model_is_whole_and_as_precise_as_was_asked(folder, zero_3, dtype):
    sharded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(parameter.numel() == 0 for parameter in sharded.parameters())
    model = load_whole(AutoModelForCausalLM, str(folder), dtype)
    assert zero.deepspeed_config() is zero_3.config
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: False)
        elsewhere.setattr(zero, "is_deepspeed_zero3_enabled", lambda: False)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert weights_digest(model.named_parameters()) == weights_digest(plain.named_parameters())
    assert weights_digest(model.named_buffers()) == weights_digest(plain.named_buffers())
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("sharding", ["second_rank", "zero_3"])
def test_what_cannot_be_loaded_leaves_the_sharding_of_the_policy_as_it_was(folder, sharding, request):
    request.getfixturevalue(sharding)
    with pytest.raises(OSError, match="nowhere"):
        load_whole(AutoModelForCausalLM, str(folder / "nowhere"), torch.float32)
    parameters = list(AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert not any(parameter.any() for parameter in parameters)


@pytest.mark.parametrize("sharding", ["second_rank", "zero_3"])
def test_a_reward_model_scores_alike_however_the_policy_is_sharded(tokenizer, tmp_path, sharding, request):
    save_reward_model(tmp_path, tokenizer, ["helpful"])
    margin = RewardModelSource(source="reward_model", path=str(tmp_path), dtype="float32")
    rows = Dataset.from_list(
        [
            {"messages": MESSAGES, "chosen_text": text, "rejected_text": text[:3], **NO_TURNS}
            for text in ("Fine.", "Not at all well")
        ]
    )

    def table():
        with margin.opened(torch.device("cpu")) as rewards:
            return both_sides(rewards, rows, [0, 1], 2, "rewards", quiet=True)

    expected = table()
    assert expected.unique().numel() == 4
    request.getfixturevalue(sharding)
    assert torch.equal(table(), expected)


def test_under_zero_3_the_name_of_a_model_is_of_its_weights(folder, zero_3):
    one, same, other, wider = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(4))
    assert all(parameter.numel() == 0 for parameter in one.parameters())
    other.model.norm.weight.ds_tensor.data[3] += 0.01
    wider.model.norm.weight.ds_shape = torch.Size([33])
    assert weights_digest(one.named_parameters()) == weights_digest(same.named_parameters())
    names = {weights_digest(model.named_parameters()) for model in (one, other, wider)}
    assert len(names) == 3
