"""Packed trees by every attention implementation that carries them, with stand-ins for the CUDA kernels."""

import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import CONFIGS, SHAPE, build_model, ragged_pairs
from kernel_stand_ins import gpu_kernels
from test_engine import assert_same, build_float64, score, scores_and_gradients
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig

from axolotl_mopo.config.host_keys import TREE_BACKENDS, carries_trees
from axolotl_mopo.logprobs import attention
from axolotl_mopo.logprobs.attention import plain_implementation, use_plain_attention, use_tree_attention
from axolotl_mopo.logprobs.layout import Layout, choose_layout, why_not_trees
from axolotl_mopo.logprobs.trees import Pair, pack, pad

KERNELS = [name for name in TREE_BACKENDS if name != "eager"]
FLASH = [name for name in KERNELS if name != "sdpa"]


def test_the_kernel_of_axolotl_for_log_probs_gives_the_same_numbers():
    """By Triton's interpreter, which must be asked for before Triton is imported."""
    command = [sys.executable, Path(__file__).with_name("triton_worker.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def called(calls):
    return {name for name, *_ in calls}


@pytest.mark.parametrize("architecture", list(CONFIGS))
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_a_kernel_is_handed_what_gives_the_numbers_of_padded_rows(architecture, implementation):
    capped = architecture == "gemma2"
    if capped:  # its cap needs eager, which overflows in float64 for padded rows
        padded = scores_and_gradients(build_model(CONFIGS[architecture], "eager"), pad(ragged_pairs(), 0))
    else:
        padded = scores_and_gradients(build_float64(architecture), pad(ragged_pairs(), 0))
    with gpu_kernels(exact=True) as calls:
        model = build_model(CONFIGS[architecture], implementation) if capped else build_float64(architecture)
        if implementation != "sdpa" and not capped:
            model.set_attn_implementation(implementation)
        use_tree_attention(model)
        packed = scores_and_gradients(model.double() if capped else model, pack(ragged_pairs()))
    if capped:
        for values, expected in zip(packed[0], padded[0], strict=True):
            assert torch.allclose(values.float(), expected.float(), atol=2e-4)
    else:
        assert_same(packed, padded, 1e-8)
    if not (capped and implementation == "sdpa"):  # torch's kernel has no cap
        assert called(calls) == {"varlen" if implementation == "sdpa" else "flash"}
        windows = {window for *_, window in calls}
        windowed = {"mistral", "gemma2", "gemma3", "phi3"}
        assert any(left == 4 for left, _ in windows) is (architecture in windowed)


@pytest.mark.parametrize("implementation", FLASH)
def test_every_flash_attention_carries_trees_and_is_itself_without_them(implementation):
    """transformers takes a name with "flash" in it, or with a slash, for a kernel that it loads itself."""
    pairs = ragged_pairs()
    prompts = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    expected = score(build_model(CONFIGS["mistral"]), pad(pairs, 0)).logps
    with gpu_kernels() as calls:
        model = build_model(CONFIGS["mistral"], implementation, torch.bfloat16).eval()
        assert why_not_trees(model) is None
        assert choose_layout(model, model, pairs) == Layout()
        plain, plain_logps = (
            model.generate(prompts, attention_mask=mask, max_new_tokens=6, do_sample=False),
            score(model, pad(pairs, 0)).logps,
        )
        use_tree_attention(model)
        assert plain_implementation(model) == implementation
        assert torch.allclose(score(model, pack(pairs)).logps, expected, atol=0.3)
        calls.clear()
        assert torch.equal(plain_logps, score(model, pad(pairs, 0)).logps)
        assert torch.equal(plain, model.generate(prompts, attention_mask=mask, max_new_tokens=6, do_sample=False))
        assert called(calls) == {"flash"}
        use_plain_attention(model)
        assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["kernels-community/flash-attn2@v2", "kernels-community/flash-attn3:flash_attn"])
def test_a_kernel_with_a_revision_or_a_function_carries_trees(name):
    assert carries_trees(name)


@pytest.mark.parametrize("name", ["kernels-community/sage-attention", "flex_attention", "xformers", "fp8"])
def test_another_kernel_carries_none(name):
    assert not carries_trees(name)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_float32_queries_reach_the_kernel_in_half_precision(implementation):
    """In mixed precision norms answer in float32, and only the values, which no norm touches, are half."""
    with gpu_kernels() as calls:
        model = build_model(CONFIGS["qwen3"], implementation)  # norms its queries and keys
        use_tree_attention(model)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = score(model, pack(ragged_pairs())).logps
        assert {dtype for _, dtype, *_ in calls} == {torch.bfloat16}
        calls.clear()
        mixed = build_model(CONFIGS["qwen3"], implementation, torch.bfloat16)
        for name, module in mixed.named_modules():
            if name.endswith(("q_norm", "k_norm")):
                module.float()  # as DeepSpeed's models are, without autocast
                module.register_forward_hook(lambda module, args, output: output.float())
        use_tree_attention(mixed)
        without = score(mixed, pack(ragged_pairs())).logps
        assert {dtype for _, dtype, *_ in calls} == {torch.bfloat16}
    expected = score(build_model(CONFIGS["qwen3"]), pad(ragged_pairs(), 0)).logps
    for logps in (autocast, without):
        assert torch.allclose(logps, expected, atol=0.3)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "newer", "kernel"),
    [
        (64, torch.bfloat16, True, True),
        (80, torch.float16, True, True),
        (256, torch.bfloat16, True, True),
        (12, torch.bfloat16, True, False),
        (264, torch.bfloat16, True, False),
        (64, torch.float32, True, False),
        (64, torch.float16, False, False),
    ],
)
def test_what_a_kernel_cannot_take_goes_by_segments(implementation, head_dim, dtype, newer, kernel):
    config = LlamaConfig(**{**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=head_dim)
    expected = score(build_model(config), pad(ragged_pairs(), 0)).logps
    with gpu_kernels() as calls, mock.patch.object(attention, "_has_kernels", lambda device: newer):
        model = build_model(config, implementation, dtype)
        use_tree_attention(model)
        logps = score(model, pack(ragged_pairs())).logps
    assert bool(calls) is kernel
    assert torch.allclose(logps, expected, atol=1e-4 if dtype == torch.float32 else 0.5)


@pytest.mark.parametrize(("capability", "kernels"), [((7, 5), False), ((7, 0), False), ((8, 0), True), ((9, 0), True)])
def test_only_ampere_and_newer_have_the_kernels(capability, kernels, monkeypatch):
    """The compute capability stands in for the GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention._has_kernels(torch.device("cuda", 0)) is kernels
    assert not attention._has_kernels(torch.device("cpu"))


def test_a_gradient_through_a_kernel_is_that_of_padded_rows_with_one_token_completions():
    pairs = [Pair([[5, 6, 7], [5, 6]], [8], [9]), Pair([[5, 6]], [10, 11, 12], [13])]
    padded = scores_and_gradients(build_float64("mistral"), pad(pairs, 0))
    with gpu_kernels(exact=True):
        model = build_float64("mistral")
        use_tree_attention(model)
        assert_same(scores_and_gradients(model, pack(pairs)), padded, 1e-8)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "segments"])
def test_random_batches_need_few_graphs(kernels):
    """One with fixed lengths and one with free ones; by segments the graph is broken at every layer's attention."""
    rng = random.Random(3)

    def tokens(most):
        return [rng.randrange(3, 97) for _ in range(rng.randint(2, most))]

    def batch():
        return pack([Pair([tokens(9)], tokens(12), tokens(12)) for _ in range(rng.randint(1, 5))])

    batches = [batch() for _ in range(20)]
    model = build_model(CONFIGS["llama"], dtype=torch.bfloat16)
    use_tree_attention(model)
    with gpu_kernels(), mock.patch.object(attention, "_has_kernels", lambda device: kernels):
        expected = [scores_and_gradients(model, batch) for batch in batches]
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        found, graphs = [], []
        for batch in batches:
            found.append(scores_and_gradients(compiled, batch))
            graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[-1] <= 2 if kernels else graphs[-1] == graphs[2]
    for (scores, _), (other, _) in zip(found, expected, strict=True):
        assert torch.allclose(scores.logps, other.logps, atol=0.2)
