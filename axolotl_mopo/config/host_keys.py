"""Axolotl's own keys: those that a run of one of the methods refuses, and those that Axolotl must be given."""

from collections.abc import Mapping
from typing import Any

from axolotl_mopo.config.methods import MethodConfig
from axolotl_mopo.errors import ConfigError

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


_OLD_ATTENTION_KEYS = ("flex_attention", "xformers_attention", "sage_attention")
"""Keys of the host for what `attn_implementation` says today, and trees cannot go by."""
_OTHER_METHODS_KEYS = {
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "simpo_gamma": "gamma",
    "cpo_alpha": "sft_coef",
    "orpo_alpha": "beta",
    "trl": "beta",
}
"""Keys of Axolotl for what another key of the block says."""
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    ": it belongs to another method of Axolotl": (
        "center_rewards_coefficient",
        "dpo_label_smoothing",
        "dpo_loss_type",
        "dpo_loss_weights",
        "dpo_padding_free",
        "dpo_use_liger_kernel",
        "dpo_use_weighting",
        "ebft",
        "kto_desirable_weight",
        "kto_undesirable_weight",
        "precompute_ref_log_probs",
        "process_reward_model",
        "reward_model",
        "rl_adapter_ref_model",
    ),
    ": Axolotl reads it for supervised training alone": (
        "auto_find_batch_size",
        "batch_flattening",
        "bench_dataset",
        "bench_split",
        "chat_template_kwargs",
        "curriculum_sampling",
        "dataset_keep_in_memory",
        "dataset_shard_idx",
        "dataset_shard_num",
        "do_bench_eval",
        "do_causal_lm_eval",
        "eot_tokens",
        "eval_causal_lm_metrics",
        "eval_max_new_tokens",
        "eval_sample_packing",
        "eval_sequence_len",
        "eval_table_size",
        "generate_samples",
        "generation_top_k",
        "generation_top_p",
        "image_resize_algorithm",
        "jagged_restart_anneal_steps",
        "jagged_restart_steps",
        "jagged_restart_warmup_steps",
        "lisa_n_layers",
        "lisa_step_interval",
        "loss_watchdog_patience",
        "loss_watchdog_threshold",
        "lr_quadratic_warmup",
        "min_sample_len",
        "multipack_real_batches",
        "neftune_noise_alpha",
        "noisy_embedding_alpha",
        "pad_to_sequence_len",
        "pose_max_context_len",
        "pose_num_chunks",
        "pose_split_on_token_ids",
        "pretrain_multipack_buffer_size",
        "pretraining_dataset",
        "pretraining_sample_concatenation",
        "relora",
        "relora_cpu_offload",
        "relora_prune_ratio",
        "role_boundaries",
        "sample_packing_eff_est",
        "sample_packing_mp_start_method",
        "sample_packing_sequentially",
        "streaming",
        "total_supervised_tokens",
        "train_on_inputs",
        "use_pose",
    ),
    ", whose loss is no cross-entropy": (
        "chunked_cross_entropy",
        "chunked_cross_entropy_num_chunks",
        "cut_cross_entropy",
        "flash_attn_cross_entropy",
        "liger_cross_entropy",
        "liger_fused_linear_cross_entropy",
        "liger_use_token_scaling",
        "use_eaft",
    ),
    ": Axolotl reads it nowhere": (
        "evaluation_strategy",
        "fsdp_final_state_dict_type",
        "lr_div_factor",
        "max_prompt_len",
        "preprocess_iterable",
    ),
}
"""Keys of Axolotl that would change nothing, by the reason that the error gives."""


def check_keys(cfg: Mapping[str, Any], method: str) -> None:
    """Refuse keys of Axolotl that have no effect on a run of `rl: <method>`, or break it.

    Raises:
        ConfigError: naming the first one.
    """
    for key, ours in _OTHER_METHODS_KEYS.items():
        if cfg.get(key) is not None:
            raise ConfigError(f"`{key}` has no effect with `rl: {method}`; remove it (see `{method}.{ours}`)")
    if cfg.get("pad_to_multiple_of"):
        raise ConfigError(f"`pad_to_multiple_of` has no effect with `rl: {method}`, which packs; remove it")
    for reason, keys in WITHOUT_EFFECT.items():
        for key in keys:
            if cfg.get(key):
                raise ConfigError(f"`{key}` has no effect with `rl: {method}`{reason}; remove it")
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if cfg.get(key) not in (None, 1):
            raise ConfigError(f"`{key}` other than 1 does not work with `rl: {method}`; remove it")
    if cfg.get("remove_unused_columns"):
        raise ConfigError(f"`remove_unused_columns: true` would drop the columns of `rl: {method}`; remove it")
    if cfg.get("skip_prepare_dataset"):
        raise ConfigError(
            "`skip_prepare_dataset: true` would keep pairs that are longer than `sequence_len`; remove it"
        )
    _check_offloading(cfg, method)


def _check_offloading(cfg: Mapping[str, Any], method: str) -> None:
    """Refuse what Axolotl builds into its trainer of supervised training alone."""
    if cfg.get("layer_offloading"):
        raise ConfigError(f"`layer_offloading` does not work with `rl: {method}`; remove it")
    checkpointing = cfg.get("gradient_checkpointing")
    if isinstance(checkpointing, str) and checkpointing.startswith("offload"):
        key = f"gradient_checkpointing: {checkpointing}"
    elif cfg.get("activation_offloading") not in (None, False, "hidden_states"):
        key = f"activation_offloading: {cfg['activation_offloading']}"
    else:
        return
    raise ConfigError(
        f"`{key}` does not work with `rl: {method}`; set `gradient_checkpointing: true`, and for the CPU to hold what "
        "it keeps `activation_offloading: hidden_states`"
    )


def check_skipping(cfg: Mapping[str, Any], on_bad_loss: str | None) -> None:
    """Refuse to skip steps that are not made where a step can be skipped.

    Raises:
        ConfigError: naming what makes them.
    """
    optimizer = str(cfg.get("optimizer"))
    within_backward = "lomo" in optimizer or "layerwise" in optimizer
    if on_bad_loss == "skip" and (cfg.get("deepspeed") or cfg.get("fp16") or within_backward):
        raise ConfigError(
            "`on_bad_loss: skip` does not go with DeepSpeed or an optimizer that makes its steps in the backward pass, "
            "nor with `fp16`, whose loss scaling skips steps by itself; remove it"
        )


def attention_advice(cfg: Mapping[str, Any], method: str, block: MethodConfig) -> str | None:
    """What to tell of an attention implementation that cannot carry packed trees, where the YAML names one.

    Raises:
        ConfigError: where packed trees are asked for all the same.
    """
    old_keys = (key for key in _OLD_ATTENTION_KEYS if cfg.get(key))
    chosen = cfg.get("attn_implementation") or next(old_keys, None)
    if chosen is None or carries_trees(str(chosen)) or block.layout == "padded":
        return None
    choices = ", ".join(TREE_BACKENDS)
    if block.layout == "packed":
        raise ConfigError(
            f"`{method}.layout: packed` does not go with the attention implementation {chosen!r}; set "
            f"`attn_implementation` to one of {choices}, or drop `layout`"
        )
    return (
        f"The attention implementation {chosen!r} cannot carry packed trees, so padded rows are trained, which costs "
        f"more; set `attn_implementation` to one of {choices}."
    )


def checkpoint_advice(cfg: Mapping[str, Any]) -> str | None:
    """Advice on checkpoints that a run cannot be resumed from, or None."""
    fsdp = cfg.get("fsdp_config")
    if not isinstance(fsdp, Mapping) or not cfg.get("adapter"):
        return None
    version = cfg.get("fsdp_version") or fsdp.get("fsdp_version")
    if str(version) != "2" or fsdp.get("state_dict_type") != "FULL_STATE_DICT":
        return None
    return (
        "With FSDP2, an adapter and `fsdp_config.state_dict_type: FULL_STATE_DICT`, accelerate writes one rank's part "
        "of the adapter into a checkpoint, so a resumed run goes on from wrong weights; set it to SHARDED_STATE_DICT."
    )
