"""Token ids -> packed trees -> completion log-probs; knows nothing of Axolotl or TRL."""

TREE_BACKENDS = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/flash-attn4",
    "kernels-community/vllm-flash-attn3",
)
"""Attention implementations that carry packed trees; a kernel's `@revision` or `:function` may follow its name."""


def carries_trees(implementation: str) -> bool:
    """Whether packed trees can go through an attention implementation."""
    return implementation.partition("@")[0].partition(":")[0] in TREE_BACKENDS
