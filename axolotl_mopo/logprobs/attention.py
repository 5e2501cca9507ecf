"""Attention over packed trees, registered with transformers next to the implementation that the user chose.

The registered name begins with `TREE_PREFIX`. It names the user's implementation with one addition: a forward pass that
passes `segments` computes attention segment by segment. Without `segments` (generation, callbacks) it calls the user's
implementation unchanged.
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward, flash_attn_supports_top_left_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from axolotl_mopo.logprobs.trees import Segments

TREE_PREFIX = "mopo_tree_"

_IGNORED_OPTIONS = {
    "cache_position",
    "dropout",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}
"""Arguments of attention functions that do not change its result here; dropout is off in training."""

_HALF = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
"""Largest head_dim of the variable-length kernels."""
_PLAIN_NAMES: dict[str, str] = {}
"""Registered name -> the user's implementation."""


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that reads tokens: the decoder of a vision-language model, else the model itself."""
    decoder = model.get_decoder() if model.config.sub_configs else model
    return decoder if isinstance(decoder, PreTrainedModel) else model


def plain_implementation(model: PreTrainedModel) -> str:
    """Return the attention implementation that the user chose, whether or not tree attention is on."""
    name = text_decoder(model).config._attn_implementation or "eager"
    return _PLAIN_NAMES.get(name, name)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Turn on packed trees for `model`; forward passes without `segments` use its own attention implementation.

    The vision part of a vision-language model keeps its attention. A model with `attn_logit_softcapping` loaded with
    `sdpa` uses `eager` instead, since `sdpa` ignores the cap.
    """
    decoder = text_decoder(model)
    chosen = decoder.config._attn_implementation
    if chosen in _PLAIN_NAMES:
        return
    if chosen == "sdpa" and getattr(decoder.config, "attn_logit_softcapping", None):
        chosen = "eager"  # sdpa ignores the cap
    # transformers treats a name with "flash" in it as its own kernel, and a name with a slash as a kernel of the hub.
    name = TREE_PREFIX + chosen.replace("flash", "fa").replace("/", ".")
    _PLAIN_NAMES[name] = chosen
    AttentionInterface.register(name, partial(tree_attention, implementation=chosen))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[chosen])
    decoder.set_attn_implementation(name)


def use_plain_attention(model: PreTrainedModel) -> None:
    """Undo `use_tree_attention`."""
    decoder = text_decoder(model)
    if decoder.config._attn_implementation in _PLAIN_NAMES:
        decoder.set_attn_implementation(plain_implementation(decoder))


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    implementation: str,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for packed trees, with the signature that transformers expects.

    Args:
        module: the attention layer.
        query: [1, heads, T, head_dim].
        key, value: [1, key heads, T, head_dim].
        attention_mask: used only if `segments` is None.
        implementation: the user's attention implementation: `sdpa`, `eager` or a flash-attention.
        segments: which keys each query attends to; None for ordinary attention.
        scaling: factor on the attention scores; None for 1 / sqrt(head_dim).
        sliding_window: number of tokens that a query attends to, itself included; None for all.
        softcap: bound of the attention scores, `softcap * tanh(score / softcap)`.
        **kwargs: further arguments of the model; passed on if `segments` is None.

    Returns:
        The attention output [1, T, heads, head_dim], and None.

    Raises:
        ValueError: if the model passes an argument that could change what packed trees attend to.
    """
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    if segments is None:
        if implementation == "eager":
            return _eager(module, query, key, value, attention_mask, **options, **kwargs)
        if _is_flash(implementation):
            return _flash_fallback(module, query, key, value, attention_mask, implementation, **options, **kwargs), None
        return ALL_ATTENTION_FUNCTIONS[implementation](module, query, key, value, attention_mask, **options, **kwargs)
    if unknown := sorted(name for name in kwargs.keys() - _IGNORED_OPTIONS if kwargs[name] is not None):
        raise ValueError(f"{type(module).__name__} passes {', '.join(unknown)}, which packed trees do not support")
    key, value = (tensor.index_select(2, segments.key_index) for tensor in (key, value))
    query, key, value = _in_one_dtype(query, key, value)
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    kernels = _kernels_support(query, key, value)
    if kernels and _is_flash(implementation):
        attended = _flash(query, key, value, segments, implementation, scaling, sliding_window, softcap)
    elif kernels and implementation == "sdpa" and softcap is None:
        attended = _varlen(query, key, value, segments, scaling, sliding_window)
    else:
        attended = _by_segment(query, key, value, segments, scaling, sliding_window, softcap)
    return attended, None


def _is_flash(implementation: str) -> bool:
    return "flash" in implementation


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to the dtype that attention computes in: autocast's, or the value's, which no float32 norm has changed."""
    device, dtype = query.device.type, value.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _kernels_support(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernels, torch's and flash-attention's, support these tensors."""
    head_dim = query.shape[-1]
    return (
        query.dtype in _HALF
        and head_dim % 8 == 0
        and head_dim <= _MAX_HEAD_DIM
        and value.shape[-1] == key.shape[-1] == head_dim
        and _has_kernels(query.device)
    )


def _has_kernels(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 8.0 (Ampere) or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    implementation: str,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    return _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        query_length=query.shape[2],
        is_causal=True,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        cu_seq_lens_q=segments.cu_seq_q,  # type: ignore[arg-type]
        cu_seq_lens_k=segments.cu_seq_k,  # type: ignore[arg-type]
        max_length_q=segments.max_q,
        max_length_k=segments.max_k,
        attn_implementation=implementation,
    )


def _flash_fallback(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    implementation: str,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Call transformers' flash-attention with the user's name for it.

    transformers' own wrapper would read the name from the model's config, which holds the registered name.

    Args:
        module: the attention layer.
        query: [B, heads, T, head_dim].
        key, value: [B, key heads, T, head_dim]; values may have a smaller head_dim.
        attention_mask: [B, T], or None without padding.
        implementation: the user's attention implementation.
        scaling, dropout, is_causal: as for transformers' attention functions.
        **kwargs: passed on.

    Returns:
        The attention output [B, T, heads, head_dim of the values].
    """
    head_dim, value_head_dim = query.shape[-1], value.shape[-1]
    attended = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        F.pad(value, (0, head_dim - value_head_dim)).transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=module.is_causal if is_causal is None else is_causal,  # type: ignore[arg-type]
        dropout=dropout,
        softmax_scale=scaling,
        use_top_left_mask=flash_attn_supports_top_left_mask(),
        target_dtype=get_target_dtype(query, module),  # adapters may have upcast half precision to float32
        attn_implementation=implementation,
        **kwargs,
    )
    return attended[..., :value_head_dim]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, sliding_window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments.cu_seq_q,
        segments.cu_seq_k,
        segments.max_q,
        segments.max_k,
        scale=scaling,
        # (-1, 0) is causal without a window; the window counts only the tokens before the query.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)  # noqa: S101 (it returns a tuple only if auxiliary outputs are requested)
    return attended[None]


@torch.compiler.disable  # segment lengths differ from batch to batch, so torch.compile would trace a graph for each
def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    # On a CPU scaled_dot_product_attention is slow with grouped heads or a bottom-right causal mask.
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    queries, keys = query.split(segments.query_lengths, dim=2), key.split(segments.key_lengths, dim=2)
    values = value.split(segments.key_lengths, dim=2)
    alike = defaultdict(list)  # segments of the same shape are computed in one call
    for number, shape in enumerate(zip(segments.query_lengths, segments.key_lengths, strict=True)):
        alike[shape].append(number)
    attended: list[Tensor] = list(queries)
    for numbers in alike.values():
        q, k, v = (torch.cat([parts[number] for number in numbers]) for parts in (queries, keys, values))
        windowed = sliding_window is not None and k.shape[2] > sliding_window
        if softcap is not None:
            mask = _bottom_right_mask(q.shape[2], k.shape[2], sliding_window, q.device)
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            result = _scores_to_values(q, k, v, bias, scaling, softcap)
        elif q.shape[2] == k.shape[2] and not windowed:
            result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        else:
            mask = _bottom_right_mask(q.shape[2], k.shape[2], sliding_window, q.device)
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        for number, part in zip(numbers, result.split(1), strict=True):
            attended[number] = part
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _bottom_right_mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    query_position = torch.arange(keys - queries, keys, device=device)[:, None]
    key_position = torch.arange(keys, device=device)
    mask = key_position <= query_position
    if sliding_window is not None:
        mask &= query_position - key_position < sliding_window
    return mask


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    attended = _scores_to_values(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attention_mask,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap,
    )
    return attended.transpose(1, 2).contiguous(), None


def _scores_to_values(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    # At least float32: a half-precision softmax rounds small probabilities to 0.
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return probs.to(value.dtype) @ value
