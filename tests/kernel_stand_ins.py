"""What the two variable-length CUDA kernels compute, in plain torch on a CPU, with the checks that they make.

They stand in for hardware that most machines lack: torch's `varlen_attn`, and flash-attention's functions under every
name by which transformers finds them. Everything else of the GPU branch is the real thing.
"""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import torch
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import PreTrainedModel

from axolotl_mopo.logprobs import attention

CALLS = []
"""The kernel, its dtype, head_dim and window of every call."""

HALF = (torch.bfloat16, torch.float16)


def attend(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap=None):
    """Every segment by itself: queries [Tq, H, d], keys and values [Tk, G, d], causal from the bottom right."""
    for boundaries, tokens in ((cu_q, q), (cu_k, k)):
        assert boundaries.dtype == torch.int32
        assert boundaries.is_contiguous()
        assert boundaries[-1] == len(tokens)
        assert (boundaries.diff() > 0).all()
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in attention._HALF
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] <= 256
    assert type(max_q) is int
    assert type(max_k) is int
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    attended = []
    for _, _, query, key, value, seen in _segments(q, k, v, cu_q, cu_k, window):
        scores = query @ key.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        attended.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(0, 1).to(q.dtype))
    return torch.cat(attended)


def _segments(q, k, v, cu_q, cu_k, window):
    """Where each segment lies, its queries, keys and values, a head for each query head, and who sees whom."""
    left, right = window
    for i in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        groups = q.shape[1] // k.shape[1]
        query = _fine(q[queries].transpose(0, 1))
        key, value = (_fine(tokens[keys].repeat_interleave(groups, 1).transpose(0, 1)) for tokens in (k, v))
        behind = torch.arange(query.shape[1])[:, None] + key.shape[1] - query.shape[1] - torch.arange(key.shape[1])
        seen = (behind >= -right) if right >= 0 else torch.ones_like(behind, dtype=torch.bool)
        if left >= 0:
            seen &= behind <= left
        yield queries, keys, query, key, value, seen


def _fine(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.library.custom_op("mopo_tests::varlen", mutates_args=())
def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: list[int],
) -> torch.Tensor:
    CALLS.append(("varlen", query.dtype, query.shape[-1], tuple(window)))
    return attend(query, key, value, cu_q, cu_k, max_q, max_k, scale, window)


@_varlen.register_fake
def _(query, *_):
    return torch.empty_like(query)


def _keep(ctx, inputs, output):
    *tensors, ctx.max_q, ctx.max_k, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


@torch.library.custom_op("mopo_tests::varlen_backward", mutates_args=())
def _backward_operator(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: list[int],
) -> list[torch.Tensor]:
    gradients = [torch.zeros_like(tensor, dtype=_fine(tensor).dtype) for tensor in (query, key, value)]
    for queries, keys, q, k, v, seen in _segments(query, key, value, cu_q, cu_k, window):
        probs = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        own = _fine(gradient[queries].transpose(0, 1))
        inner = own @ v.transpose(1, 2)
        scores = probs * (inner - (inner * probs).sum(-1, keepdim=True)) * scale
        heads = (key.shape[1], -1, *k.shape[1:])  # queries of one group share a key
        gradients[0][queries] = (scores @ k).transpose(0, 1)
        gradients[1][keys] = (scores.transpose(1, 2) @ q).view(heads).sum(1).transpose(0, 1)
        gradients[2][keys] = (probs.transpose(1, 2) @ own).view(heads).sum(1).transpose(0, 1)
    return [tensor.to(query.dtype) for tensor in gradients]


@_backward_operator.register_fake
def _(gradient, query, key, value, *_):
    return [torch.empty_like(tensor) for tensor in (query, key, value)]


def _varlen_backward(ctx, gradient):
    options = (ctx.max_q, ctx.max_k, ctx.scale, ctx.window)
    return *_backward_operator(gradient, *ctx.saved_tensors, *options), *(None,) * 6


_varlen.register_autograd(_varlen_backward, setup_context=_keep)


def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn, which is one operator to a compiler, as the real one is."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _varlen(query, key, value, cu_q, cu_k, max_q, max_k, scale, list(window_size))


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    """flash_attn.flash_attn_varlen_func, and what its relatives call by the same name."""
    CALLS.append(("flash", q.dtype, q.shape[-1], window_size))
    window = (window_size[0], 0 if causal else window_size[1])
    return attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, window, softcap=softcap
    )


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """flash_attn.flash_attn_func: the same for a batch [B, T, H, d] without padding."""
    (batch, queries), keys = q.shape[:2], k.shape[1]
    cu_q, cu_k = (torch.arange(0, batch * n + 1, n, dtype=torch.int32) for n in (queries, keys))
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
    return flash_attn_varlen_func(
        *flat, cu_q, cu_k, queries, keys, dropout_p, softmax_scale, causal, window_size, softcap
    ).view(q.shape)


def _module(name, **attributes):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


@contextmanager
def gpu_kernels(exact=False):
    """Let the engine and transformers believe, for a while, that this machine has a GPU's kernels.

    Args:
        exact: whether the kernels take, and compute in, any dtype, so that what is handed to them can be checked to the
            last digits.
    """
    functions = {
        "flash_attn_func": flash_attn_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": None,
    }
    padding = {"pad_input": flash_utils._pad_input, "unpad_input": flash_utils._unpad_input}
    modules = {
        "flash_attn": _module("flash_attn", **functions),
        "flash_attn.bert_padding": _module("flash_attn.bert_padding", **padding),
        "flash_attn.cute": _module("flash_attn.cute", **functions),
        "flash_attn_interface": _module("flash_attn_interface", **functions),
    }
    matrix = {
        version: {**entry, "general_availability_check": lambda: True}
        for version, entry in flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
    }
    CALLS.clear()
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.dict(flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX, matrix),
        mock.patch.object(flash_utils, "is_flash_attn_2_available", lambda: True),
        mock.patch.object(flash_utils, "_loaded_implementation", None),
        mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True),
        mock.patch("transformers.integrations.hub_kernels.get_kernel", lambda *_, **__: _module("kernel", **functions)),
        mock.patch("torch.nn.attention.varlen.varlen_attn", varlen_attn),
        mock.patch.object(attention, "_has_kernels", lambda device: True),
        mock.patch.object(attention, "_HALF", (*HALF, torch.float64) if exact else HALF),
    ):
        yield CALLS
