"""Names of models: whatever changes their numbers changes the name, and nothing else does."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bitsandbytes.nn import Linear4bit
from conftest import CONFIGS, build_model, ragged_pairs, save_adapter, stir
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_mopo.config import MODPOConfig
from axolotl_mopo.digests.weights import policy_digests, tensor_digests, weights_digest
from axolotl_mopo.logprobs.attention import use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.passes import PassCounts
from axolotl_mopo.training.collator import PairCollator
from axolotl_mopo.training.pair_logprobs import PairLogProbs
from axolotl_mopo.training.precompute import Precomputation
from axolotl_mopo.training.table_cache import TableCache

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def llama(**changed):
    config = copy.deepcopy(CONFIGS["llama"])
    for name, value in changed.items():
        setattr(config, name, value)
    return build_model(config)


def adapted(base=None, **changed):
    torch.manual_seed(1)
    return stir(get_peft_model(base or llama(), LoraConfig(**{**LORA, **changed})))


def test_values_that_are_as_much_larger_as_they_stand_earlier_make_another_name():
    one, other = (torch.tensor(values, dtype=torch.int32).view(torch.float32) for values in ([1, 5, 9], [6, 0, 9]))
    assert sorted((one.view(torch.int32) + torch.arange(3)).tolist()) == sorted(
        (other.view(torch.int32) + torch.arange(3)).tolist()
    )
    assert weights_digest([("w", one)]) != weights_digest([("w", other)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_name_is_of_values_order_shape_and_type(dtype):
    tensor = torch.arange(12).to(dtype)
    others = [tensor.flip(0), tensor.roll(1), tensor.view(3, 4), tensor.to(torch.float64), tensor[:-1]]
    names = {weights_digest([("w", other)]) for other in [tensor, *others]}
    assert len(names | {weights_digest([("v", tensor)])}) == 7
    assert weights_digest([("w", tensor.view(3, 4).T.contiguous().T)]) == weights_digest([("w", tensor.view(3, 4))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_two_of_many_small_changes_have_one_name(dtype):
    zero = torch.zeros(64, dtype=dtype)
    bits = zero.view(torch.int32 if dtype == torch.float32 else torch.int16)
    names = set()
    for position in range(64):
        for value in range(1, 33):
            changed = bits.clone()
            changed[position] = value
            names.add(tensor_digests([("w", changed.view(dtype))])["w"])
    assert len(names) == 64 * 32


def scaled_rotation(model):
    model.model.rotary_emb.inv_freq *= 1.01
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 10600.0}),
        lambda: llama(rms_norm_eps=1e-5),
        lambda: llama(tie_word_embeddings=True),
        lambda: scaled_rotation(llama()),
    ],
    ids=["rope_theta", "rms_norm_eps", "tied", "buffer"],
)
def test_what_a_base_model_computes_besides_its_weights_is_in_its_name(other):
    model = other()
    assert policy_digests(llama())[0] != policy_digests(model)[0]
    assert policy_digests(adapted())[0] != policy_digests(adapted(other()))[0]


def test_what_changes_no_number_is_in_no_name():
    name = policy_digests(llama())
    other = llama(use_cache=False, transformers_version="1.0", _name_or_path="/elsewhere", architectures=["Other"])
    use_tree_attention(other)
    assert policy_digests(other) == name
    assert policy_digests(adapted())[0] == name[0]
    fresh = get_peft_model(llama(), LoraConfig(**LORA, modules_to_save=None))
    assert policy_digests(fresh) == (name[0], name[0])
    tokens = get_peft_model(llama(), LoraConfig(**LORA, trainable_token_indices=[3]))
    assert policy_digests(tokens)[0] == name[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"target_modules": ["v_proj"]},
        {"use_dora": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_how_an_adapter_is_used_is_in_the_policys_name(changed):
    (base, policy), (same_base, other) = policy_digests(adapted()), policy_digests(adapted(**changed))
    assert base == same_base
    assert len({base, policy, other}) == 3


def test_where_an_adapter_came_from_is_not_in_the_policys_name(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert policy_digests(again) == policy_digests(model)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", False])
def test_a_start_that_is_not_zero_is_not_taken_for_the_base_model(init):
    base, policy = policy_digests(get_peft_model(llama(), LoraConfig(**LORA, init_lora_weights=init)))
    assert base != policy


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_start_that_changes_nothing_is_the_base_model(init):
    base, policy = policy_digests(get_peft_model(llama(), LoraConfig(**LORA, init_lora_weights=init)))
    assert base == policy


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_tokens_delta"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_an_adapter_holds_besides_its_factors_may_change_the_policy(kind, part):
    """The second factors are all zero, so the rest is all that counts."""
    model = get_peft_model(llama(), LoraConfig(**LORA, **kind))
    parts = [parameter for name, parameter in model.named_parameters() if part in name]
    assert parts
    names = [policy_digests(model)]
    with torch.no_grad():
        for parameter in parts:
            parameter += 0.1
    names.append(policy_digests(model))
    assert {base for base, _ in names} == {policy_digests(llama())[0]}
    assert names[1][1] not in (names[1][0], names[0][1])


@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
def test_what_dequantises_four_bits_is_in_the_name(nested):
    def quantised(change=lambda state: None):
        torch.manual_seed(0)
        layer = Linear4bit(64, 64, quant_type="nf4", compress_statistics=nested)
        layer.weight.data.copy_(torch.randn(64, 64))
        layer.to("cpu")
        assert layer.weight.quant_state is not None
        change(layer.weight.quant_state)
        return weights_digest(layer.named_parameters())

    def double(state):
        scales = state.state2.absmax if nested else state.absmax
        scales *= 2

    def shift(state):
        state.code += 0.01

    assert quantised() == quantised()
    assert len({quantised(), quantised(double), quantised(shift)}) == 3


ROWS = Dataset.from_list(
    [
        {"prompt_input_ids": [pair.prompts[0]], "chosen_input_ids": pair.chosen, "rejected_input_ids": pair.rejected}
        for pair in ragged_pairs(1)
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    save_adapter(folder, folder / "adapter", seed=3)
    return folder


@pytest.fixture
def compute(folder, tmp_path):
    """Compute the constants of a policy and one margin; gives them, and how many tables that added."""

    def compute(margin, model, precision="no"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        scorer = PairLogProbs(
            model, LogProbComputer(base), PairCollator(0, packed=False), accelerator, PassCounts(False), 2
        )
        margins = {"b": {"source": "adapter", "beta": 0.2, **margin}}
        method = MODPOConfig(objective="a", weights={"a": 1, "b": 1}, margins=margins)
        before = len(list(tmp_path.glob("*.safetensors")))
        constants = Precomputation(method, model, scorer, TableCache(tmp_path, accelerator)).constants({"train": ROWS})
        return constants["train"], len(list(tmp_path.glob("*.safetensors"))) - before

    yield compute
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_precision_attention_configuration_and_an_older_release_miss_the_tables(folder, compute, kind, monkeypatch):
    whole = {"path": str(folder), "reference": str(folder / "other")}
    llama(rms_norm_eps=1e-3).save_pretrained(folder / "other")
    margin = whole if kind == "whole" else {"path": str(folder / "adapter")}
    load = partial(AutoModelForCausalLM.from_pretrained, folder)
    first, made = compute(margin, load())
    assert made == (3 if kind == "whole" else 2)
    found, again = compute(margin, load())
    assert again == 0
    assert torch.equal(found.reference, first.reference)
    assert torch.equal(found.margins, first.margins)
    assert compute(margin, load(), "bf16")[1] == made
    assert compute(margin, load(attn_implementation="eager"))[1] == made
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters["rope_theta"] = 10600.0
    changed, missed = compute(margin, load(config=config))
    assert missed == (1 if kind == "whole" else 2)  # whole models bring their own configuration
    assert not torch.allclose(changed.reference, first.reference, atol=1e-3)
    monkeypatch.setattr("axolotl_mopo.training.precompute._VERSION", 2)
    assert compute(margin, load())[1] == made


def test_a_margin_that_brings_a_head_along_leaves_the_policy_to_a_run_that_finds_its_table(folder, compute, tmp_path):
    """The first run computes the table and the second finds it; both go on with one policy."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "head")
    runs = []
    for _ in range(2):
        policy = AutoModelForCausalLM.from_pretrained(folder)
        constants, made = compute({"path": str(tmp_path / "head")}, policy)
        runs.append((constants, made, weights_digest(policy.named_parameters())))
    (first, computed, left), (second, found, right) = runs
    assert (computed, found) == (2, 0)
    assert left == right
    assert torch.equal(first.margins, second.margins)
    assert first.margins.abs().max() > 0.1
