"""Token ids -> packed trees -> completion log-probs; knows nothing of Axolotl or TRL."""

TREE_BACKENDS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Attention implementations that packed trees can go by."""
