"""Packed trees give exactly what one padded row for each prompt and completion gives."""

import copy
from collections import Counter

import pytest
import torch
from conftest import CONFIGS, MIXTURES, SHAPE, build_model, ragged_pairs
from torch import nn
from transformers import (
    FalconH1Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaForCausalLM,
    MambaConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from axolotl_mopo.logprobs.attention import (
    TREE_PREFIX,
    plain_implementation,
    use_plain_attention,
    use_tree_attention,
)
from axolotl_mopo.logprobs.computer import LogProbComputer, completion_logprobs
from axolotl_mopo.logprobs.layout import Layout, choose_layout, tolerance_of, why_not_trees
from axolotl_mopo.logprobs.trees import Pair, pack, pad

score = LogProbComputer()
ARCHITECTURES = list(CONFIGS)


class FineNorm(nn.Module):
    """An RMSNorm that stays in float64; transformers' own rounds to float32, which hides what is below 1e-6."""

    def __init__(self, norm, gemma):
        super().__init__()
        self.weight, self.offset = norm.weight, 1.0 if gemma else 0.0
        self.eps = norm.eps if gemma else norm.variance_epsilon

    def forward(self, hidden):
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        return hidden * scale * (self.weight + self.offset)


def build_float64(architecture, attention="sdpa"):
    return with_fine_norms(build_model(CONFIGS[architecture], attention, torch.float64), architecture)


def with_fine_norms(model, architecture):
    """Replace the norms of a model in float64 by those that stay in float64."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, FineNorm(child, gemma=architecture.startswith("gemma")))
            elif type(child).__name__ == "OlmoLayerNorm":
                setattr(parent, name, nn.LayerNorm(child.normalized_shape, eps=1e-5, elementwise_affine=False))
    return model


def scores_and_gradients(model, batch):
    model.zero_grad()
    scores = score(model, batch)
    # Every completion has a gradient of its own.
    (scores.logps * torch.linspace(-1, 1, len(scores.logps), dtype=scores.logps.dtype)).sum().backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance):
    (scores, gradients), (other_scores, other_gradients) = one, other
    for values, other_values in zip(scores, other_scores, strict=True):
        assert torch.allclose(values, other_values, rtol=0, atol=tolerance)
    assert gradients.keys() == other_gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma2"])
def test_packed_equals_padded_in_float64(architecture, checkpointing):
    model = build_float64(architecture)
    padded = scores_and_gradients(model, pad(ragged_pairs(), 0))
    assert why_not_trees(model) is None
    use_tree_attention(model)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(scores_and_gradients(model, pack(ragged_pairs())), padded, 1e-8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_padded_with_eager_attention(architecture):
    """float32: in float64 transformers' own eager mask overflows for padded rows. Gemma 2's cap needs eager."""
    model = build_model(CONFIGS[architecture], "eager")
    padded = scores_and_gradients(model, pad(ragged_pairs(), 0))
    use_tree_attention(model)
    assert_same(scores_and_gradients(model, pack(ragged_pairs())), padded, 2e-4)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *MIXTURES.values(), PhiConfig(**SHAPE)], ids=type)
def test_the_cheapest_layout_that_gives_the_models_numbers_is_found(config):
    model = build_model(config)
    assert choose_layout(model, model, ragged_pairs()) == Layout()
    assert not choose_layout(model, model, ragged_pairs(), "padded").packed
    assert not model.config._attn_implementation.startswith(TREE_PREFIX)


def test_attention_matters_in_these_models():
    """The parity above would show a wrong window, a wrong cap or a wrong key."""
    pairs = ragged_pairs()
    for architecture, change in (("mistral", {"sliding_window": 6}), ("gemma2", {"attn_logit_softcapping": 1.0})):
        model = build_model(CONFIGS[architecture], "eager")
        changed = build_model(type(CONFIGS[architecture])(**{**CONFIGS[architecture].to_dict(), **change}), "eager")
        difference = score(model, pad(pairs, 0)).logps - score(changed, pad(pairs, 0)).logps
        assert difference.abs().max() > 1e-2


def test_padded_equals_one_plain_forward_for_each_sequence():
    model = build_model(CONFIGS["llama"], dtype=torch.float64)
    scores = score(model, pad(ragged_pairs(), 0))
    sequences = [(p, c) for pair in ragged_pairs() for p in pair.prompts for c in (pair.chosen, pair.rejected)]
    for completion, (prompt, tokens) in enumerate(sequences):
        logps = model(torch.tensor([prompt + tokens])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        per_token = logps.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        probs = per_token.exp()
        std = probs.std() if len(tokens) > 1 else torch.tensor(0.0)
        assert scores.lengths[completion] == len(tokens)
        assert scores.logps[completion].item() == pytest.approx(per_token.sum().item(), abs=1e-6)
        assert scores.prob_mean[completion].item() == pytest.approx(probs.mean().item(), abs=1e-8)
        assert scores.prob_std[completion].item() == pytest.approx(std.item(), abs=1e-8)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_a_sequence_may_be_as_long_as_the_window_a_token_less_or_a_token_more(architecture):
    """Each begins a tree, by itself, and its last token counts, since the other completion goes on from there."""
    lengths = range(1, 8)
    pairs = [Pair([[10 * n, *range(3, 2 + n)]], [90], [90, 91 + n % 3, 6]) for n in lengths]
    batch = pack(pairs)
    whole = {q for q, k in zip(batch["segments"].query_lengths, batch["segments"].key_lengths, strict=True) if q == k}
    assert {4, 5, 6, 7} <= whole
    model = build_float64(architecture)
    padded = scores_and_gradients(model, pad(pairs, 0))
    use_tree_attention(model)
    assert_same(scores_and_gradients(model, batch), padded, 1e-8)


def test_tokens_of_a_large_vocabulary_share_what_they_have_in_common():
    """Tokens that are alike in their low bytes, or their high ones, stand between sequences that begin alike."""
    for first in (5, 300, 70_000, 5 + (1 << 24)):
        for other in (first + 256, first + (1 << 16), first ^ 1):
            pairs = [Pair([[first, 40 + n], [other, 41 + n]], [7, 8], [9]) for n in (0, 2, 4)]
            assert pack(pairs)["input_ids"].shape == (1, 2 + 6 * (1 + 3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_completion_does_not_see_the_other_one(architecture):
    model = build_model(CONFIGS[architecture])
    use_tree_attention(model)
    (pair, *rest) = ragged_pairs()
    before = score(model, pack([pair, *rest])).logps.view(-1, 2, 2)
    other_rejected = pair._replace(rejected=[5] * 11)
    after = score(model, pack([other_rejected, *rest])).logps.view(-1, 2, 2)
    assert torch.allclose(before[0, :, 0], after[0, :, 0], atol=1e-5)
    assert not torch.isclose(before[0, :, 1], after[0, :, 1]).any()
    other_chosen = pair._replace(chosen=[5] * 3)
    after = score(model, pack([other_chosen, *rest])).logps.view(-1, 2, 2)
    assert torch.allclose(before[0, :, 1], after[0, :, 1], atol=1e-5)
    assert not torch.isclose(before[0, :, 0], after[0, :, 0]).any()


def test_a_packed_row_has_no_padding_and_every_prompt_once():
    pairs = ragged_pairs()
    batch = pack(pairs)
    tokens = sum(len(prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs for prompt in pair.prompts)
    assert batch["input_ids"].shape == (1, tokens)
    # The first tokens of both completions share a row of logits.
    assert len(batch["logits_to_keep"]) == len(batch["predictors"]) - len(batch["lengths"]) // 2


def test_whatever_sequences_share_is_computed_once_and_exactly():
    """The D prompts begin alike, pairs share prompt and completions, completions begin alike or are the same."""
    system, a, b, c = [5, 6, 7, 8], [9, 10, 11], [9, 10, 12, 13], [14]
    pairs = [
        Pair([[*system, 20, 21], [*system, 22]], a, b),
        Pair([[*system, 20, 21], [*system, 22]], b, c),
        Pair([[*system, 20, 21]], c, c),
        Pair([[*system, 20, 21, 9]], [10], [11, 11]),  # ends where a completion of another pair begins
    ]
    batch = pack(pairs)
    assert batch["input_ids"].shape == (1, 4 + (2 + 3 + 2 + 1) + (1 + 3 + 2 + 1) + 2)
    model = build_float64("llama")
    padded = scores_and_gradients(model, pad(pairs, 0))
    use_tree_attention(model)
    assert_same(scores_and_gradients(model, batch), padded, 1e-8)


def test_only_completion_logits_are_computed():
    model = build_model(CONFIGS["llama"])
    use_tree_attention(model)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    batch = pack(ragged_pairs())
    score(model, batch)
    assert shapes == [(1, len(batch["logits_to_keep"]), 97)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_segments_the_model_is_as_it_was(attention):
    prompt = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for architecture in ("llama", "gemma2"):
        config = CONFIGS[architecture]
        model = build_model(config, attention if architecture == "llama" else "eager").eval()

        def generate(model=model):
            return model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)

        before = generate()
        use_tree_attention(model)
        assert model.config._attn_implementation.startswith(TREE_PREFIX)
        assert torch.equal(before, generate())
        assert TREE_PREFIX not in model.config.to_json_string()
        use_plain_attention(model)
        assert not model.config._attn_implementation.startswith(TREE_PREFIX)
        assert torch.equal(before, generate())


@pytest.mark.parametrize("inside", [False, True])
def test_half_precision_logits_are_summed_in_float32(inside):
    model = build_model(CONFIGS["llama"], dtype=torch.bfloat16)
    prompt, completion = [5, 6, 7], [8, 9, 10, 11]
    batch = pad([Pair([prompt], completion, completion)], 0)
    logps = LogProbComputer(model if inside else None)(model, batch).logps
    assert logps.dtype == torch.float32
    logits = model(torch.tensor([prompt + completion])).logits[0, 2:-1].float()
    expected = logits.log_softmax(-1)[range(4), completion].sum()
    assert torch.allclose(logps, expected, atol=1e-5)


def test_half_precision_log_probs_are_summed_in_float32():
    logps = (torch.randn(600, generator=torch.Generator().manual_seed(0)) - 1.5).bfloat16()
    scores = completion_logprobs(logps, torch.zeros(600, dtype=torch.long), torch.tensor([600]))
    assert scores.logps.dtype == scores.prob_mean.dtype == scores.prob_std.dtype == torch.float32
    assert scores.logps.item() == pytest.approx(logps.double().sum().item(), abs=1e-3)
    assert scores.prob_std.item() == pytest.approx(logps.double().exp().std().item(), rel=1e-5)


def test_a_single_token_has_no_spread():
    scores = completion_logprobs(torch.tensor([-0.3, -0.5, -0.7]), torch.tensor([0, 1, 1]), torch.tensor([1, 2]))
    assert scores.prob_std[0] == 0
    assert scores.prob_std[1] == pytest.approx(torch.tensor([-0.5, -0.7]).exp().std().item())


@pytest.mark.parametrize("architecture", list(MIXTURES))
def test_a_mixture_of_experts_takes_trees(architecture):
    model = build_model(MIXTURES[architecture])
    padded = scores_and_gradients(model, pad(ragged_pairs(), 0))
    assert why_not_trees(model) is None
    use_tree_attention(model)
    assert_same(scores_and_gradients(model, pack(ragged_pairs())), padded, 1e-3)


SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
MAMBA_SHAPE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), "AttentionInterface"),
        (FalconH1Config(**SMALL, **MAMBA_SHAPE, num_key_value_heads=2, mamba_chunk_size=8), "AttentionInterface"),
        (RecurrentGemmaConfig(**SMALL, num_key_value_heads=1, lru_width=32, attention_window_size=5), "recurrent"),
        (GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=4), "sinks"),
        (
            Llama4TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, num_local_experts=2),
            "chunked_attention",
        ),
    ],
    ids=["mamba", "falcon_h1", "recurrent_gemma", "gpt_oss", "llama4"],
)
def test_an_architecture_that_cannot_take_trees_is_told(config, reason):
    model = build_model(config, "eager")
    assert reason in why_not_trees(model)
    layout = choose_layout(model, model, ragged_pairs())
    assert not layout.packed
    assert layout.fused_head is not isinstance(config, RecurrentGemmaConfig)  # which caps its head's logits its own way
    assert reason in layout.why_not_packed
    assert score(model, pad(ragged_pairs(), 0)).logps.isfinite().all()
    with pytest.raises(ValueError, match=reason):
        choose_layout(model, model, ragged_pairs(), "packed")


def test_an_architecture_that_hands_its_attention_something_unknown_goes_to_padded_rows():
    class Sinking(LlamaForCausalLM):
        """Hands its attention what could be a bias of the scores."""

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
            inputs = (input_ids, attention_mask, position_ids)
            return super().forward(*inputs, logits_to_keep=logits_to_keep, attention_bias=1.0, **kwargs)

    model = Sinking(copy.deepcopy(CONFIGS["llama"]))
    layout = choose_layout(model, model, ragged_pairs())
    assert not layout.packed
    assert "LlamaAttention passes attention_bias" in layout.why_not_packed


def test_an_attention_implementation_that_cannot_carry_trees_is_told():
    model = build_model(CONFIGS["llama"])
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in why_not_trees(model)


def test_a_model_whose_numbers_differ_falls_back_to_padded_rows():
    class Leaky(LlamaForCausalLM):
        """Mixes neighbouring tokens outside attention, where segments cannot keep them apart."""

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
            embedded = self.get_input_embeddings()(input_ids).cumsum(1)
            return super().forward(
                None, attention_mask, position_ids, inputs_embeds=embedded, logits_to_keep=logits_to_keep, **kwargs
            )

    model = Leaky(copy.deepcopy(CONFIGS["llama"]))
    assert why_not_trees(model) is None
    layout = choose_layout(model, model, [Pair([[5, 6, 7]], [8, 9, 10], [11, 12])])
    assert not layout.packed
    assert "differ" in layout.why_not_packed
    with pytest.raises(ValueError, match="cannot be trained in packed trees: token log-probs differ"):
        choose_layout(model, model, ragged_pairs(), "packed")
    assert not model.config._attn_implementation.startswith(TREE_PREFIX)


def test_segments_move_as_a_whole():
    segments = pack(ragged_pairs())["segments"]
    moved = segments.to("meta")
    assert {moved.key_index.device.type, moved.cu_seq_q.device.type, moved.cu_seq_k.device.type} == {"meta"}
    assert (moved.query_lengths, moved.max_k) == (segments.query_lengths, segments.max_k)


def test_no_segment_is_empty_and_those_of_one_shape_are_attended_at_once(monkeypatch):
    same = [[60, 61], [60, 61], [70, 71], [60, 61]]
    pairs = [Pair([[5, 6, 7], [8, 9, 10]], completion, [50, 51]) for completion in same]
    segments = (batch := pack(pairs))["segments"]
    assert min(segments.query_lengths) > 0
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *rest, **options: calls.append(len(query)) or attention(query, *rest, **options),
    )
    model = build_model(CONFIGS["llama"])
    use_tree_attention(model)
    score(model, batch)
    shapes = Counter(zip(segments.query_lengths, segments.key_lengths, strict=True))
    assert max(shapes.values()) > 2
    assert sorted(calls) == sorted([*shapes.values()] * model.config.num_hidden_layers)


def test_tree_attention_that_is_used_twice_is_undone_at_once():
    model = build_model(CONFIGS["llama"])
    for _ in range(2):
        use_tree_attention(model)
    assert model.config._attn_implementation == TREE_PREFIX + "sdpa"
    assert plain_implementation(model) == "sdpa"
    use_plain_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_numbers_that_are_no_numbers_fall_back_to_padded_rows():
    """NaN is neither above nor below a tolerance."""

    class Failing(LlamaForCausalLM):
        """Gives no numbers for packed rows."""

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
            output = super().forward(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, **kwargs)
            output.logits = output.logits * (torch.nan if position_ids is not None else 1)
            return output

    model = Failing(copy.deepcopy(CONFIGS["llama"]))
    layout = choose_layout(model, model, ragged_pairs())
    assert layout == Layout("token log-probs differ by nan, more than 0.01")


def test_one_pair_among_many_that_differs_is_enough():
    """The completions of the last pair alone, which are a token long, differ by a little more than is tolerated."""
    last = ragged_pairs()[-1].chosen[0]

    class Odd(LlamaForCausalLM):
        """Shifts the logit of a token in packed rows."""

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
            output = super().forward(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, **kwargs)
            if position_ids is not None:
                output.logits[..., last] += 0.012
            return output

    torch.manual_seed(0)
    model = Odd(copy.deepcopy(CONFIGS["llama"]))
    assert "differ" in choose_layout(model, model, ragged_pairs()).why_not_packed


@pytest.mark.parametrize(
    ("dtype", "mixed", "tolerance"),
    [
        (torch.float32, False, 0.01),
        (torch.float64, False, 0.01),
        (torch.float32, True, 0.25),
        (torch.bfloat16, False, 0.25),
        (torch.float16, True, 0.25),
    ],
)
def test_half_precision_of_weights_or_passes_widens_the_tolerance(dtype, mixed, tolerance):
    assert tolerance_of(torch.zeros(1, dtype=dtype), mixed) == tolerance
