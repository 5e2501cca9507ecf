"""Margin adapters of every kind beside policies of every kind: the adapter's own numbers, and a policy left alone."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from bitsandbytes.nn import Linear4bit
from conftest import CONFIGS, build_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_mopo.digests.weights import policy_digests
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.rewards.adapter_twin import unchanged, with_adapter

IDS = torch.tensor([[5, 9, 3, 60, 4, 7]])
POLICIES = {
    "full": None,
    "lora": {"target_modules": ["q_proj", "o_proj"]},
    "lora-and-whole-modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "lora-and-tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5, 6]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}
SOURCES = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["v_proj"], "use_dora": True},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole-head-and-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "saved-embeddings": {"target_modules": ["q_proj"]},
}


def adapted(base, settings, seed):
    """A base model with an adapter whose every trainable tensor has moved."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.2
    return model.eval()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """Makes a base model, of biases in its attention and with or without a head of its own."""
    folder = tmp_path_factory.mktemp("base")
    config = copy.deepcopy(CONFIGS["qwen2"])
    config.tie_word_embeddings = request.param
    build_model(config).save_pretrained(folder)
    return partial(AutoModelForCausalLM.from_pretrained, folder)


@pytest.fixture(scope="module")
def margins(base, tmp_path_factory):
    """The folders of margin adapters."""
    folders = {}
    for name, settings in SOURCES.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        model = adapted(base(), settings, seed=1)
        saved = name == "saved-embeddings"
        if saved:
            with torch.no_grad():
                model.get_input_embeddings().weight += torch.randn_like(model.get_input_embeddings().weight) * 0.1
        model.save_pretrained(folders[name], **({"save_embedding_layers": True} if saved else {}))
    return folders


def policy_of(base, name):
    model = base().eval() if POLICIES[name] is None else adapted(base(), POLICIES[name], seed=2)
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.requires_grad_(number % 3 != 0)
    return model.train()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def everything(model):
    """All that a pass could leave behind in a model."""
    return {
        "modules": {name: (module, module.training) for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "parameters": {name: (p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: (tensor,) for name, tensor in model.named_buffers()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def same(before, after):
    return before.keys() == after.keys() and all(
        all(a is b or a == b for a, b in zip(before[name], after[name], strict=True)) for name in before
    )


@pytest.mark.parametrize("margin", SOURCES)
@pytest.mark.parametrize("policy", POLICIES)
def test_an_adapter_has_its_own_numbers_and_leaves_the_policy_alone(base, margins, policy, margin):
    model = policy_of(base, policy)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, digests = everything(model), policy_digests(model)
    with unchanged(model, margins[margin]), with_adapter(model, margins[margin]) as own:
        own.model.norm.register_forward_hook(lambda *_: None)
        found = logits(own)
    after = everything(model)
    for what in before:
        assert same(before[what], after[what]), what
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert policy_digests(model) == digests
    expected = logits(PeftModel.from_pretrained(base(), margins[margin]))
    assert (expected - logits(base())).abs().max() > 0.05
    assert torch.equal(found, expected)


@pytest.fixture(autouse=True)
def no_state_of_other_tests():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_bf16(model):
    """Wrapped as for mixed precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


def dispatched(model):
    """Wrapped as where layers are on several devices."""
    devices = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    return dispatch_model(model, {**devices, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("wrapped", [in_bf16, dispatched])
def test_a_forward_pass_that_is_wrapped_runs_the_adapter_and_not_the_policy(base, margins, wrapped):
    model = wrapped(base().eval())
    assert any("forward" in vars(module) for module in model.modules())
    plain = logits(model)
    with with_adapter(model, margins["lora"]) as own:
        found = logits(own)
    expected = logits(wrapped(PeftModel.from_pretrained(base(), margins["lora"]).get_base_model()))
    assert torch.equal(found, expected)
    assert torch.equal(logits(model), plain)
    assert (found - plain).abs().max() > 0.05


def test_an_adapter_beside_a_policy_of_four_bits(tmp_path):
    config = copy.deepcopy(CONFIGS["qwen2"])
    config.hidden_size, config.intermediate_size = 64, 128  # four-bit weights come in blocks of 64
    build_model(config).save_pretrained(tmp_path)
    margin = adapted(AutoModelForCausalLM.from_pretrained(tmp_path), SOURCES["whole-head"], seed=1)
    margin.save_pretrained(path := str(tmp_path / "margin"))
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path, quantization_config=config)
    model = adapted(load(), POLICIES["lora"], seed=2)
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, Linear4bit)
    plain = logits(model)  # a CPU repacks four-bit weights when they are first run
    digests, before = policy_digests(model), everything(model)
    with unchanged(model, path), with_adapter(model, path) as own:
        found = logits(own)
    after = everything(model)
    assert all(same(before[what], after[what]) for what in before)
    assert policy_digests(model) == digests
    assert torch.equal(logits(model), plain)
    assert torch.equal(found, logits(PeftModel.from_pretrained(load(), path)))


def test_a_forward_pass_that_is_wrapped_in_an_unknown_way_stops_the_run(base, margins):
    model = base()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with (
        pytest.raises(RuntimeError, match="the forward method of Qwen2ForCausalLM is replaced"),
        with_adapter(model, margins["lora"]),
    ):
        pass


def test_an_adapter_of_a_wider_model_is_refused_and_leaves_the_policy_alone(base, tmp_path):
    config = copy.deepcopy(CONFIGS["qwen2"])
    config.hidden_size = 64
    adapted(build_model(config), SOURCES["lora"], seed=1).save_pretrained(tmp_path)
    model = policy_of(base, "lora")
    before = everything(model)
    with (
        pytest.raises(ConfigError, match=r"(?s)does not fit the base model: .*size mismatch"),
        with_adapter(model, str(tmp_path)),
    ):
        pass
    after = everything(model)
    assert all(same(before[what], after[what]) for what in before)


def test_a_policy_that_changes_meanwhile_is_noticed(base):
    model = base()
    with pytest.raises(RuntimeError, match=r"the adapter a/b changed model.norm.weight of the policy"):  # noqa: SIM117
        with unchanged(model, "a/b"), torch.no_grad():
            model.model.norm.weight[3] += 0.01
