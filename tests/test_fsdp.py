"""FSDP2 in half precision rounds what a module returns, but not our log-probs."""

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIGS, build_model, ragged_pairs
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from axolotl_mopo.logprobs.attention import use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.trees import pack, pad


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded_scores(output_dtype, batch, packed, budget):
    """Log-probs and gradients of a model whose weights FSDP2 holds, computed in bf16."""
    model = build_model(CONFIGS["llama"])
    if packed:
        use_tree_attention(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    scores = LogProbComputer(model, budget)(model, batch)
    (scores.logps * torch.linspace(-1, 1, len(scores.logps))).sum().backward()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return scores, {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("budget", [None, 12 * 97 * 5], ids=["at once", "in chunks"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_log_probs_leave_a_sharded_model_unrounded(group, packed, budget):
    """accelerate sets `output_dtype`; the layers' outputs are in bf16 anyway."""
    batch = pack(ragged_pairs()) if packed else pad(ragged_pairs(), 0)
    expected, expected_gradients = sharded_scores(None, batch, packed, budget)
    scores, gradients = sharded_scores(torch.bfloat16, batch, packed, budget)
    assert scores.logps.dtype == torch.float32
    assert not torch.equal(expected.logps, expected.logps.bfloat16().float())  # rounding would show
    for values, other in zip(scores, expected, strict=True):
        assert torch.allclose(values, other, atol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-6), name
        assert gradient.any(), name
