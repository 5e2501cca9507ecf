"""Log-probs that a model's head answers with, whole or in chunks, are those of the logits that it returns."""

import copy

import pytest
import torch
from conftest import CONFIGS, SHAPE, build_model, ragged_pairs, stir
from peft import LoraConfig, get_peft_model
from test_engine import build_float64
from torch import nn
from transformers import CohereConfig, Gemma4Config, Gemma4ForConditionalGeneration, LlamaForCausalLM, PhiConfig

from axolotl_mopo.logprobs import log_softmax
from axolotl_mopo.logprobs.attention import use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.layout import Layout, choose_layout, plan_layout
from axolotl_mopo.logprobs.trees import Pair, pack, pad

VOCABULARY = 97
ROWS = 7
BUDGET = ROWS * 12 * VOCABULARY
"""Bytes of this many rows of logits, as `logits_budget` counts them."""


@pytest.mark.parametrize("entries", [1, 3])
def test_log_probs_of_single_tokens_and_their_gradients(entries, monkeypatch):
    monkeypatch.setattr(log_softmax, "_BYTES_AT_ONCE", 3 * 11 * 8)  # three rows at once
    weights = torch.randn(2, 5, entries, dtype=torch.float64)
    index = torch.randint(11, (2, 5, entries))
    index[0, 0] = 4  # one token several times
    inputs = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    expected = inputs.log_softmax(-1).gather(-1, index)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), inputs)
    logits = inputs * 1.0
    logps = log_softmax.selective_log_softmax(logits, index)
    assert torch.allclose(logps, expected, atol=1e-12)
    (other,) = torch.autograd.grad((logps * weights).sum(), inputs, retain_graph=True)
    assert torch.allclose(other, gradient, atol=1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_a_row_may_be_larger_than_what_is_worked_on_at_once(monkeypatch):
    """As in float32 with a vocabulary above 262,144."""
    monkeypatch.setattr(log_softmax, "_BYTES_AT_ONCE", 11 * 8 - 1)
    inputs, index = torch.randn(4, 11, dtype=torch.float64, requires_grad=True), torch.randint(11, (4, 1))
    expected = inputs.log_softmax(-1).gather(-1, index)
    logps = log_softmax.selective_log_softmax(inputs * 1.0, index)
    assert torch.allclose(logps, expected, atol=1e-12)
    gradients = (torch.autograd.grad(values.sum(), inputs)[0] for values in (expected, logps))
    assert torch.allclose(*gradients, atol=1e-12)


def scores_and_gradients(model, scorer, batch):
    model.zero_grad()
    scores = scorer(model, batch)
    (scores.logps * torch.linspace(-1, 1, len(scores.logps), dtype=scores.logps.dtype)).sum().backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance=1e-8):
    (scores, gradients), (other_scores, other_gradients) = one, other
    for values, other_values in zip(scores, other_scores, strict=True):
        assert torch.allclose(values, other_values, rtol=0, atol=tolerance)
    assert gradients.keys() == other_gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=tolerance, atol=tolerance), name


def build(kind, base=None):
    """A model in float64 whose head is of some kind, and the transformers model inside it."""
    config = {"bias": PhiConfig(**SHAPE), "cap": CONFIGS["gemma2"]}.get(kind, CONFIGS["llama"])
    base = base or build_model(config, dtype=torch.float64)
    if kind == "tied":
        base.lm_head.weight = base.model.embed_tokens.weight
    if kind == "bias":
        nn.init.normal_(base.lm_head.bias)
    targets = {"lora": ["q_proj", "lm_head"], "lora elsewhere": ["q_proj"], "saved": ["q_proj"]}.get(kind)
    if not targets:
        return base, base
    saved = ["lm_head"] if kind == "saved" else None
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM")
    return stir(get_peft_model(base, config)), base


KINDS = ["plain", "tied", "bias", "cap", "lora", "lora elsewhere", "saved"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_answers_with_the_log_probs_of_its_logits(kind, checkpointing):
    model, base = build(kind)
    batch = pad(ragged_pairs(), 0)
    expected = scores_and_gradients(model, LogProbComputer(), batch)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    assert_same(scores_and_gradients(model, LogProbComputer(base), batch), expected)
    assert_same(scores_and_gradients(model, LogProbComputer(base, BUDGET), batch), expected)
    assert base.config.to_dict() == build(kind)[1].config.to_dict()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("budget", [None, BUDGET], ids=["whole", "chunks"])
def test_adapters_have_the_same_gradients_in_every_layout(budget, checkpointing):
    model, base = build("lora", build_float64("llama"))
    expected = scores_and_gradients(model, LogProbComputer(), pad(ragged_pairs(), 0))
    use_tree_attention(base)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    assert_same(scores_and_gradients(model, LogProbComputer(base, budget), pack(ragged_pairs())), expected)


def test_a_quantised_head_is_asked_as_a_module():
    model = build_model(CONFIGS["llama"])
    with pytest.warns(Warning):
        quantised = torch.ao.quantization.quantize_dynamic(model, {"lm_head"}, dtype=torch.qint8)
    assert not isinstance(quantised.lm_head, nn.Linear)
    batch = pad(ragged_pairs(), 0)
    with torch.no_grad():
        plain, expected, chunked = (
            scorer(each, batch).logps
            for scorer, each in (
                (LogProbComputer(), model),
                (LogProbComputer(), quantised),
                (LogProbComputer(quantised, BUDGET), quantised),
            )
        )
    assert (plain - expected).abs().max() > 1e-3
    # Activations are quantised by the range of the rows that are together.
    assert torch.allclose(chunked, expected, rtol=0.02)


def test_no_more_logits_than_the_budget_are_there_at_once():
    model = build_model(CONFIGS["llama"])
    batch = pad(ragged_pairs(), 0)
    rows = []
    model.lm_head.register_forward_hook(lambda head, args, logits: rows.append(args[0].shape[1]))
    LogProbComputer(model, BUDGET)(model, batch).logps.sum().backward()
    assert max(rows) == ROWS
    # One row so that the head runs at all, every chunk in the forward pass, and again in the backward pass.
    assert sum(rows) == 1 + 2 * len(batch["rows"])
    rows.clear()
    LogProbComputer(model, BUDGET * 100)(model, batch).logps.sum().backward()
    assert rows == [len(batch["rows"])]


def test_a_capped_logit_counts_twice_and_a_row_is_always_computed():
    rows = []

    def most_at_once(kind, budget):
        model, _ = build(kind)
        rows.clear()
        model.lm_head.register_forward_hook(lambda head, args, logits: rows.append(args[0].shape[1]))
        LogProbComputer(model, budget)(model, pad(ragged_pairs(), 0))
        return max(rows)

    assert most_at_once("plain", BUDGET) == most_at_once("cap", 2 * BUDGET) == ROWS
    assert most_at_once("plain", BUDGET - 1) == most_at_once("cap", 2 * BUDGET - 1) == ROWS - 1
    assert most_at_once("plain", 1) == 1


def test_the_model_returns_logits_again_when_it_was_scored():
    model, _ = build("cap")
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    LogProbComputer(model, BUDGET)(model, pad(ragged_pairs(), 0))
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(IndexError):
        LogProbComputer(model)(model, pad([Pair([[5]], [VOCABULARY + 3], [6])], 0))
    assert torch.equal(model(ids).logits, before)
    assert model.config.final_logit_softcapping == 5.0


def test_a_cap_in_the_config_of_a_text_model_within_is_applied_once():
    text = {
        **SHAPE,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "final_logit_softcapping": 3.0,
    }
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=None, audio_config=None))
    nn.init.normal_(model.lm_head.weight)
    batch = pad(ragged_pairs(), 0)
    assert choose_layout(model, model, ragged_pairs()).fused_head
    with torch.no_grad():
        expected = LogProbComputer()(model, batch).logps
        assert torch.allclose(LogProbComputer(model, BUDGET)(model, batch).logps, expected, atol=1e-4)
        model.config.text_config.final_logit_softcapping = None
        assert (LogProbComputer()(model, batch).logps - expected).abs().max() > 1  # the cap matters


def test_an_architecture_that_changes_its_heads_logits_is_told():
    model = build_model(CohereConfig(**SHAPE, logit_scale=0.5))
    layout = choose_layout(model, model, ragged_pairs())
    assert layout.packed
    assert not layout.fused_head
    assert layout.why_not_fused_head == "it changes the head's logits (logit_scale)"


def test_a_change_of_the_heads_logits_that_changes_nothing_is_none():
    model = build_model(CohereConfig(**SHAPE, logit_scale=1.0))
    assert choose_layout(model, model, ragged_pairs()) == Layout()


def test_a_model_without_a_head_or_one_that_is_compiled_returns_its_logits(monkeypatch):
    model = build_model(CONFIGS["llama"])
    assert plan_layout(model) == Layout()
    assert plan_layout(model, compiled=True) == Layout(None, "it is compiled")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert plan_layout(model) == Layout(None, "it has no head of its own")


def test_a_tenth_of_what_layouts_may_differ_by_is_too_much_for_one_batch():
    class Shifting(LlamaForCausalLM):
        """Raises the logit of every second token a little."""

        def forward(self, *args, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
            output = super().forward(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, **kwargs)
            output.logits[..., ::2] += 0.006
            return output

    layout = choose_layout(model := Shifting(copy.deepcopy(CONFIGS["llama"])), model, ragged_pairs())
    assert layout.packed
    assert layout.why_not_fused_head.endswith("more than 0.001")


def test_a_layout_is_tried_on_the_ends_of_prompts_and_the_beginnings_of_completions():
    model = build_model(CONFIGS["llama"])
    prompt, chosen, rejected = ([first, *[7] * 88, last] for first, last in ((10, 11), (12, 13), (14, 15)))
    tried = []
    model.register_forward_pre_hook(lambda module, args, inputs: tried.append(inputs["input_ids"]), with_kwargs=True)
    choose_layout(model, model, [Pair([prompt], chosen, rejected)])
    assert {tuple(ids.shape) for ids in tried} == {(1, 3 * 64), (2, 2 * 64)}
    assert {token for ids in tried for token in ids.flatten().tolist()} == {7, 11, 12, 14}


def test_a_head_whose_answer_is_changed_unknown_to_us_is_found_out():
    plain = build_model(CONFIGS["llama"])

    class Doubling(type(plain)):
        """Doubles what its head says."""

        def forward(self, *args, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
            output = super().forward(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubling(copy.deepcopy(CONFIGS["llama"]))
    model.load_state_dict(plain.state_dict())
    layout = choose_layout(model, model, ragged_pairs())
    assert layout.packed
    assert not layout.fused_head
    assert "token log-probs differ" in layout.why_not_fused_head


def test_scoring_reads_nothing_back_from_the_device():
    """On the meta device there is nothing to read: whatever asks for a value raises."""
    for attention in ("sdpa", "eager"):
        model = build_model(CONFIGS["llama"], attention).to("meta")
        use_tree_attention(model)
        batch = {name: value.to("meta") for name, value in pack(ragged_pairs()).items()}
        for scorer in (LogProbComputer(), LogProbComputer(model), LogProbComputer(model, BUDGET)):
            scores = scorer(model, batch)
            scores.logps.sum().backward()
            assert scores.logps.shape == batch["lengths"].shape
