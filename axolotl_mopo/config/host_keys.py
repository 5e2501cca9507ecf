"""Checks of Axolotl's own keys: refuse those that do not work with the methods, warn about others."""

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
"""Attention implementations that support packed trees; `@revision` or `:function` may follow a kernel's name."""


def carries_trees(implementation: str) -> bool:
    """Whether an attention implementation supports packed trees."""
    return implementation.partition("@")[0].partition(":")[0] in TREE_BACKENDS


_TEXT_PROCESSOR = "AutoTokenizer"
"""The `processor_type` with which Axolotl loads a vision-language model without its image processor."""
_OLD_ATTENTION_KEYS = ("flex_attention", "xformers_attention", "sage_attention")
"""Older keys of Axolotl for attention implementations, none of which supports packed trees."""
_OTHER_METHODS_KEYS = {
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "simpo_gamma": "gamma",
    "cpo_alpha": "sft_coef",
    "orpo_alpha": "beta",
    "trl": "beta",
}
"""Keys of Axolotl's other methods, and the key of the block that replaces each."""
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
    ": Axolotl reads it for supervised training only": (
        "auto_find_batch_size",
        "batch_flattening",
        "bench_dataset",
        "bench_split",
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
    ", which trains on texts only": (
        "image_resize_algorithm",
        "image_size",
    ),
    ", whose loss is not a cross-entropy": (
        "chunked_cross_entropy",
        "chunked_cross_entropy_num_chunks",
        "cut_cross_entropy",
        "flash_attn_cross_entropy",
        "liger_cross_entropy",
        "liger_fused_linear_cross_entropy",
        "liger_use_token_scaling",
        "use_eaft",
    ),
    ": Axolotl never reads it": (
        "evaluation_strategy",
        "fsdp_final_state_dict_type",
        "lr_div_factor",
        "max_prompt_len",
        "preprocess_iterable",
    ),
}
"""Keys of Axolotl that would change nothing, grouped by the reason that the error gives."""
SUPERVISED_ARGUMENTS = (
    "dataloader_drop_last",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_timeout",
    "greater_is_better",
    "metric_for_best_model",
)
"""Training arguments that Axolotl sets for supervised training only."""
DATA_LOADING = {"dataloader_num_workers": 1, "dataloader_pin_memory": True, "dataloader_prefetch_factor": 8}
"""Data loading if the YAML sets none of these keys; Axolotl would prefetch 256 batches, gigabytes of long pairs."""


def check_keys(cfg: Mapping[str, Any], method: str) -> None:
    """Refuse keys of Axolotl that have no effect on a run of `rl: <method>`, or break it.

    Raises:
        ConfigError: if there is such a key; names the first one.
    """
    for key, ours in _OTHER_METHODS_KEYS.items():
        if cfg.get(key) is not None:
            raise ConfigError(f"`{key}` has no effect with `rl: {method}`; remove it (see `{method}.{ours}`)")
    if cfg.get("pad_to_multiple_of"):
        raise ConfigError(f"`pad_to_multiple_of` has no effect with `rl: {method}`, which packs sequences; remove it")
    for reason, keys in WITHOUT_EFFECT.items():
        for key in keys:
            if cfg.get(key):
                raise ConfigError(f"`{key}` has no effect with `rl: {method}`{reason}; remove it")
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if cfg.get(key) not in (None, 1):
            raise ConfigError(f"`{key}` other than 1 does not work with `rl: {method}`; remove it")
    if cfg.get("processor_type") not in (None, _TEXT_PROCESSOR):
        raise ConfigError(
            f"`processor_type: {cfg['processor_type']}` starts multimodal training, but `rl: {method}` trains on texts "
            "only; remove it, and Axolotl loads the model's own processor; if that cannot be loaded (torchvision is "
            f"missing), set it to {_TEXT_PROCESSOR}"
        )
    if cfg.get("remove_unused_columns"):
        raise ConfigError(f"`remove_unused_columns: true` would drop the columns of `rl: {method}`; remove it")
    if cfg.get("skip_prepare_dataset"):
        raise ConfigError(
            "`skip_prepare_dataset: true` would keep pairs that are longer than `sequence_len`; remove it"
        )
    _check_offloading(cfg, method)


def _check_offloading(cfg: Mapping[str, Any], method: str) -> None:
    """Refuse offloading that Axolotl implements for supervised training only."""
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
        f"`{key}` does not work with `rl: {method}`; set `gradient_checkpointing: true`, and to keep its checkpoints "
        "on the CPU `activation_offloading: hidden_states`"
    )


def check_skipping(cfg: Mapping[str, Any], on_bad_loss: str | None) -> None:
    """Refuse `on_bad_loss: skip` if the trainer cannot skip an optimizer step.

    Raises:
        ConfigError: if DeepSpeed, `fp16` or the backward pass controls the optimizer steps.
    """
    optimizer = str(cfg.get("optimizer"))
    within_backward = "lomo" in optimizer or "layerwise" in optimizer
    if on_bad_loss == "skip" and (cfg.get("deepspeed") or cfg.get("fp16") or within_backward):
        raise ConfigError(
            "`on_bad_loss: skip` does not work with DeepSpeed, with an optimizer that steps in the backward pass, or "
            "with `fp16`, whose loss scaling skips steps itself; remove it"
        )


def attention_advice(cfg: Mapping[str, Any], method: str, block: MethodConfig) -> str | None:
    """A warning if the YAML names an attention implementation that does not support packed trees, else None.

    Raises:
        ConfigError: if the YAML also sets `layout: packed`.
    """
    old_keys = (key for key in _OLD_ATTENTION_KEYS if cfg.get(key))
    chosen = cfg.get("attn_implementation") or next(old_keys, None)
    if chosen is None or carries_trees(str(chosen)) or block.layout == "padded":
        return None
    choices = ", ".join(TREE_BACKENDS)
    if block.layout == "packed":
        raise ConfigError(
            f"`{method}.layout: packed` does not work with the attention implementation {chosen!r}; set "
            f"`attn_implementation` to one of {choices}, or remove `layout`"
        )
    return (
        f"The attention implementation {chosen!r} does not support packed trees, so rows are padded, which is slower; "
        f"set `attn_implementation` to one of {choices}."
    )


def checkpoint_advice(cfg: Mapping[str, Any]) -> str | None:
    """A warning if a run could not be resumed from its checkpoints, else None."""
    fsdp = cfg.get("fsdp_config")
    if not isinstance(fsdp, Mapping) or not cfg.get("adapter"):
        return None
    version = cfg.get("fsdp_version") or fsdp.get("fsdp_version")
    if str(version) != "2" or fsdp.get("state_dict_type") != "FULL_STATE_DICT":
        return None
    return (
        "With FSDP2, an adapter and `fsdp_config.state_dict_type: FULL_STATE_DICT`, accelerate saves only one "
        "rank's part of the adapter, so a resumed run starts from wrong weights; set it to SHARDED_STATE_DICT."
    )
