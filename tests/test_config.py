"""Every setting that cannot work is refused with the key, the fault and how to fix it."""

import copy
import math

import pytest

from axolotl_mopo.config import (
    AMoPOConfig,
    MODPOConfig,
    check_skipping,
    checkpoint_advice,
    fold_dotted_keys,
    parse_settings,
)
from axolotl_mopo.config.host_keys import WITHOUT_EFFECT
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.plugin import MOPOPlugin

AMOPO = {
    "rl": "amopo",
    "amopo": {"dimensions": ["helpfulness", "correctness"]},
    "datasets": [{"path": "pairs.jsonl", "type": "axolotl_mopo.pairs"}],
}
MODPO = {
    "rl": "modpo",
    "modpo": {
        "objective": "better",
        "weights": {"better": 0.5, "safer": 0.5},
        "margins": {"safer": {"source": "column"}},
    },
    "datasets": [{"path": "pairs.jsonl", "type": "axolotl_mopo.pairs"}],
}


def changed(base, **changes):
    """A copy of the configuration with `block__key` or `key` replaced."""
    cfg = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split("__")
        target = cfg
        for parent in parents:
            target = target[parent]
        target[last] = value
    return cfg


def refusal(cfg):
    with pytest.raises(ConfigError) as caught:
        MOPOPlugin().register(cfg)
    return str(caught.value)


def test_the_two_bases_are_accepted():
    for cfg in (AMOPO, MODPO):
        MOPOPlugin().register(copy.deepcopy(cfg))


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (
            changed(AMOPO, amopo__betta=1),
            ["`amopo.betta` is not a known key", "did you mean `beta`?", "the known keys are"],
        ),
        (changed(MODPO, modpo__objektive="x"), ["`modpo.objektive` is not a known key", "did you mean `objective`?"]),
        (
            changed(MODPO, modpo__margins={"safer": {"source": "column", "feild": "x"}}),
            ["`modpo.margins.safer.feild` is not a known key", "did you mean `field`?"],
        ),
        (changed(AMOPO, modpo={"objective": "x"}), ["`modpo:` has no effect with `rl: amopo`", "remove the block"]),
        (changed(MODPO, amopo={"dimensions": ["x"]}), ["`amopo:` has no effect with `rl: modpo`", "remove the block"]),
        ({"rl": "amopo"}, ["`rl: amopo` needs a block `amopo:`", "dimensions"]),
        ({"rl": "modpo"}, ["`rl: modpo` needs a block `modpo:`", "objective and weights"]),
        (changed(AMOPO, rl="dpo"), ["`amopo:` has no effect with `rl: dpo`", "set `rl: amopo`"]),
        (changed(MODPO, rl="orpo"), ["`modpo:` has no effect with `rl: orpo`", "set `rl: modpo`"]),
        (changed(MODPO, rl=None), ["`modpo:` has no effect with `rl: None`"]),
        (changed(AMOPO, amopo=["helpfulness"]), ["`amopo` must be a mapping", "['helpfulness']"]),
        ({**AMOPO, "amopo": {"beta": 1}}, ["`amopo.dimensions` is missing", "a list of at least one score name"]),
        ({**MODPO, "modpo": {"objective": "better"}}, ["`modpo.weights` is missing", "a mapping from the objective"]),
        (
            changed(MODPO, modpo__weights={"safer": 0.5}),
            ["weights has no entry for the objective 'better'", "add `better: 0.5`"],
        ),
        (
            changed(MODPO, modpo__weights={"beter": 0.5, "safer": 0.5}),
            ["weights has no entry for the objective 'better'", "did you mean `beter`?"],
        ),
        (
            changed(MODPO, modpo__weights={"better": 0.5, "safe": 0.5}),
            ["weights names safe", "margins has no entry", "add `safe: {source: column}`"],
        ),
        (
            changed(MODPO, modpo__weights={"better": 0.5}),
            ["margins names safer", "weights has no entry", "add `safer: 0.5`"],
        ),
        (
            changed(MODPO, modpo__margins={"safer": {"source": "column"}, "better": {"source": "column"}}),
            ["margins names the objective 'better' itself"],
        ),
        (
            changed(MODPO, modpo__weights={"better": 0, "safer": 1}),
            ["the weight of the objective 'better' is 0", "must be positive", "margins alone"],
        ),
        (changed(MODPO, modpo__weights={"better": -1, "safer": 1}), ["is -1", "must be positive"]),
        (changed(MODPO, modpo__weights={"better": math.nan, "safer": 1}), ["`modpo.weights.better`", "finite", "nan"]),
        (changed(MODPO, modpo__weights={"better": 1, "safer": math.inf}), ["`modpo.weights.safer`", "finite", "inf"]),
        (changed(MODPO, modpo__weights={"better": True, "safer": 1}), ["`modpo.weights.better`", "not true or false"]),
        (changed(AMOPO, amopo__gamma=b"0"), ["`amopo.gamma`", "input should be a number, not binary data"]),
        (changed(MODPO, modpo__beta=0), ["`modpo.beta`", "greater than 0", "a positive number"]),
        (changed(MODPO, modpo__beta=math.nan), ["`modpo.beta`", "finite", "nan"]),
        (changed(MODPO, modpo__loss_type="ipo"), ["`modpo.loss_type`", "'ipo'", "sigmoid or hinge"]),
        (
            changed(MODPO, modpo__margins={"safer": {"source": "colum"}}),
            ["`modpo.margins.safer`", "one of column, length"],
        ),
        (changed(MODPO, modpo__margins={"safer": {}}), ["`modpo.margins.safer`", "needs a `source`, one of column,"]),
        (
            changed(MODPO, modpo__margins={"safer": {"source": "length", "unit": "lines"}}),
            ["`modpo.margins.safer.unit`", "'lines'", "one of tokens, words, characters"],
        ),
        (changed(AMOPO, amopo__beta=-0.5), ["`amopo.beta`", "greater than 0", "-0.5"]),
        (changed(AMOPO, amopo__beta="strong"), ["`amopo.beta`", "a positive number", "'strong'"]),
        (changed(AMOPO, amopo__gamma=-1), ["`amopo.gamma`", "greater than or equal to 0", "-1"]),
        (changed(AMOPO, amopo__gamma=math.inf), ["`amopo.gamma`", "finite", "inf"]),
        (changed(AMOPO, amopo__temperature=0), ["`amopo.temperature`", "greater than 0", "The paper uses 1.0"]),
        (changed(AMOPO, amopo__temperature=-1), ["`amopo.temperature`", "greater than 0", "-1"]),
        (changed(AMOPO, amopo__sft_coef=-1), ["`amopo.sft_coef`", "greater than or equal to 0"]),
        (changed(AMOPO, amopo__dimensions=[]), ["`amopo.dimensions`", "at least 1", "a list of at least one"]),
        (changed(AMOPO, amopo__dimensions=["a", "b", "a"]), ["`amopo.dimensions`", "a is named more than once"]),
        (changed(AMOPO, amopo__dimensions=["a", " "]), ["`amopo.dimensions`", "empty name"]),
        (
            changed(AMOPO, amopo__dimensions=["integrated"]),
            ["'integrated'", "rename the dimension", "integrated: false"],
        ),
        (changed(AMOPO, amopo__loss_type="dpo"), ["`amopo.loss_type`", "'dpo'", "simpo or orpo"]),
        (
            changed(AMOPO, amopo__weighting="gausian"),
            ["unknown weighting 'gausian'", "gaussian, mean, uniform", "did you mean `gaussian`?"],
        ),
        (changed(AMOPO, amopo__weighting=3), ["`amopo.weighting`", "unknown weighting 3"]),
        (
            changed(AMOPO, amopo__weighting={"helpfulness": 0.5, "correctness": 0.5}),
            [
                "weighting names helpfulness, correctness",
                "integrated, helpfulness, correctness",
                "each of them a weight",
            ],
        ),
        (
            changed(AMOPO, amopo__weighting={"helpfulness": 1, "correctness": 1, "integrated": 0}),
            ["the weights sum to 2", "must sum to 1"],
        ),
        (
            changed(AMOPO, amopo__weighting={"helpfulness": math.nan, "correctness": 0.5, "integrated": 0.5}),
            ["the weight of helpfulness is nan", "finite number"],
        ),
        (
            changed(AMOPO, amopo__weighting={"helpfulness": -0.5, "correctness": 1, "integrated": 0.5}),
            ["the weight of helpfulness is -0.5", "at least 0"],
        ),
        (changed(AMOPO, amopo__score_range=[5, 1]), ["`amopo.score_range`", "the lowest score 5 is not below"]),
        (changed(AMOPO, amopo__score_range=[1]), ["`amopo.score_range", "missing", "[lowest, highest]"]),
        (changed(AMOPO, amopo__integrated="maybe"), ["`amopo.integrated`", "true or false"]),
        (
            changed(AMOPO, amopo__directives={"dimension": "Mind {{ dimesion }}."}),
            [
                "`amopo.directives.dimension`",
                "unknown variable dimesion",
                "the known variables are dimension, dimensions, high",
            ],
        ),
        (
            changed(AMOPO, amopo__directives={"integrated": "Score {{ score }}."}),
            [
                "`amopo.directives.integrated`",
                "unknown variable score",
                "the known variables are dimensions, high, low",
            ],
        ),
        (
            changed(AMOPO, amopo__directives={"integrated": "{% if %}"}),
            ["it is not a valid Jinja template", "in line 1"],
        ),
        (
            changed(AMOPO, amopo__directives={"integrated": "  "}),
            ["`amopo.directives.integrated`", "it renders to an empty text"],
        ),
        (
            changed(AMOPO, amopo__directives={"integratd": "x"}),
            ["`amopo.directives.integratd`", "did you mean `integrated`"],
        ),
        (changed(AMOPO, amopo__directives="x"), ["`amopo.directives`", "{dimension: TEMPLATE, integrated: TEMPLATE}"]),
        (
            changed(AMOPO, amopo__directives={"dimension": {"file": "/etc/passwd"}}),
            ["the file /etc/passwd is not a template; its name must end with .jinja"],
        ),
        (
            changed(AMOPO, amopo__directives={"dimension": {"file": "no/such.jinja"}}),
            ["the file no/such.jinja cannot be read"],
        ),
        (
            changed(AMOPO, amopo__directives={"dimension": {"path": "x"}}),
            ["write the template itself, or {file: PATH}"],
        ),
        (
            changed(AMOPO, amopo__directives={"integrated": "{{ dimensions.__class__.__mro__ }}"}),
            ["it reads the attribute `__mro__`; only those of `loop` can be read"],
        ),
        (
            changed(AMOPO, amopo__directives={"integrated": "{% include '/etc/passwd' %}"}),
            ["`amopo.directives.integrated`", "it may contain only variables, conditions, filters and loops, 2 deep"],
        ),
        (
            changed(AMOPO, amopo__directives={"integrated": "{{ dimensions.append(1) }}"}),
            ["it calls a function; only `range` and `loop.cycle` can be called"],
        ),
        (changed(AMOPO, rl_beta=0.1), ["`rl_beta` has no effect with `rl: amopo`", "amopo.beta"]),
        (changed(MODPO, trl={"beta": 0.1}), ["`trl` has no effect with `rl: modpo`", "modpo.beta"]),
        (changed(AMOPO, pad_to_multiple_of=8), ["`pad_to_multiple_of` has no effect", "remove it"]),
        (changed(AMOPO, context_parallel_size=2), ["`context_parallel_size` other than 1 does not work", "remove it"]),
        (changed(AMOPO, remove_unused_columns=True), ["`remove_unused_columns: true`", "remove it"]),
        (changed(AMOPO, sequence_parallel_degree=2), ["`sequence_parallel_degree` other than 1 does not work"]),
        (changed(MODPO, skip_prepare_dataset=True), ["`skip_prepare_dataset: true` would keep", "longer than `seque"]),
        (changed(MODPO, layer_offloading=True), ["`layer_offloading` does not work with `rl: modpo`", "remove it"]),
        (
            changed(AMOPO, gradient_checkpointing=True, activation_offloading=True),
            ["`activation_offloading: True` does not work", "set `gradient_checkpointing: true`", "hidden_states"],
        ),
        (changed(AMOPO, activation_offloading="legacy"), ["`activation_offloading: legacy` does not work"]),
        (changed(MODPO, gradient_checkpointing="offload"), ["`gradient_checkpointing: offload` does not work"]),
        (changed(MODPO, dpo_beta=0.1), ["`dpo_beta` has no effect with `rl: modpo`", "see `modpo.beta`"]),
        (changed(AMOPO, amopo__on_bad_loss="skip", fp16=True), ["`on_bad_loss: skip` does not work with", "`fp16`"]),
        (changed(AMOPO, amopo__on_bad_loss="skip", deepspeed="zero3.json"), ["`on_bad_loss: skip`", "DeepSpeed"]),
        (changed(MODPO, modpo__on_bad_loss="skip", optimizer="q_galore_adamw8bit_layerwise"), ["in the backward pass"]),
        (changed(MODPO, modpo__on_bad_loss="skip", optimizer="adalomo"), ["in the backward pass", "remove it"]),
        (changed(AMOPO, amopo__layout="row"), ["`amopo.layout`", "'packed' or 'padded'", "'row'"]),
        (changed(AMOPO, amopo__max_tokens_per_pass=0), ["`amopo.max_tokens_per_pass`", "at least 1"]),
        (changed(AMOPO, amopo__max_tokens_per_pass=True), ["`amopo.max_tokens_per_pass`", "at least 1"]),
        (changed(MODPO, modpo__logits_budget=0), ["`modpo.logits_budget`", "a positive number"]),
        (changed(AMOPO, amopo__directive_position="behind"), ["`amopo.directive_position`", "before or after"]),
        (
            changed({**MODPO, "attn_implementation": "flex_attention"}, modpo__layout="packed"),
            ["`modpo.layout: packed` does not work with the attention implementation 'flex_attention'", "one of sdpa,"],
        ),
        (
            changed({**AMOPO, "xformers_attention": True}, amopo__layout="packed"),
            ["does not work with the attention implementation 'xformers_attention'", "or remove `layout`"],
        ),
        (changed(AMOPO, trainer_cls="my.Trainer"), ["`trainer_cls` has no effect with `rl: amopo`", "remove it"]),
        (changed(AMOPO, datasets=3), ["`datasets` must be a list of mappings", "not 3"]),
        (changed(AMOPO, mopo_data=[1]), ["`mopo_data` is set by the plugin", "remove it"]),
        (
            changed(AMOPO, datasets=[{"path": "p", "type": "axolotl_mopo.pairs@0123"}]),
            ["`datasets[0].type` is 'axolotl_mopo.pairs@0123'"],
        ),
        (changed(AMOPO, datasets=["pairs.jsonl"]), ["`datasets[0]` must be a mapping", "'pairs.jsonl'"]),
        (
            changed(AMOPO, datasets=[{"path": "p", "type": "chatml.intel"}]),
            ["`datasets[0].type` is 'chatml.intel'", "axolotl_mopo.pairs"],
        ),
        (changed(AMOPO, datasets=[{"path": "p"}]), ["`datasets[0].type` is None", "axolotl_mopo.pairs"]),
        (
            changed(AMOPO, test_datasets=[{"path": "p", "type": "axolotl_mopo.pears"}]),
            ["`test_datasets[0].type` is 'axolotl_mopo.pears'"],
        ),
        (
            changed(AMOPO, datasets=[{"path": "p", "type": "axolotl_mopo.pairs", "field_choosen": "x"}]),
            ["`datasets[0].field_choosen` is not a known key", "did you mean `field_chosen`?"],
        ),
        (
            changed(AMOPO, datasets=[{"path": "p", "type": "axolotl_mopo.pairs", "score_scale": [4, 0]}]),
            ["`datasets[0]`", "score_scale [4.0, 0.0] must be [lowest, highest]"],
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused(cfg, words):
    text = refusal(copy.deepcopy(cfg))
    for word in words:
        assert word in text


@pytest.mark.parametrize("base", [AMOPO, MODPO], ids=["amopo", "modpo"])
def test_a_key_that_is_turned_off_is_accepted(base):
    keys = [key for keys in WITHOUT_EFFECT.values() for key in keys]
    keys += ["activation_offloading", "layer_offloading", "skip_prepare_dataset", "remove_unused_columns"]
    MOPOPlugin().register({**copy.deepcopy(base), **dict.fromkeys(keys, False)})
    offloading = {"gradient_checkpointing": True, "activation_offloading": "hidden_states"}
    MOPOPlugin().register({**copy.deepcopy(base), **offloading})


def test_an_attention_implementation_that_cannot_carry_trees_is_told_of(host_log):
    for attention, layout, told in (
        ("flex_attention", None, True),
        ("flex_attention", "padded", False),
        ("sdpa", None, False),
        ("flash_attention_2", "packed", False),
        ("flash_attention_4", "packed", False),
        ("kernels-community/flash-attn3@v1", "packed", False),
        ("kernels-community/sage-attention", None, True),
        ("fp8", None, True),  # which Axolotl loads as sdpa, so that the model alone would not show it
    ):
        host_log.clear()
        cfg = changed({**AMOPO, "attn_implementation": attention}, amopo__layout=layout)
        MOPOPlugin().register(cfg)
        assert (f"'{attention}' does not support packed trees, so rows are padded" in host_log.text) is told
        assert cfg["amopo"]["layout"] == ("padded" if told else layout)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"adapter": "lora"}, True),
        ({"adapter": "lora", "fsdp_version": None, "fsdp_config": {"fsdp_version": 2}}, True),
        ({}, False),
        ({"adapter": "lora", "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, False),
        ({"adapter": "lora", "fsdp_config": {"state_dict_type": None}}, False),
        ({"adapter": "lora", "fsdp_version": 1}, False),
    ],
)
def test_checkpoints_that_hold_one_ranks_part_of_an_adapter_are_told_of(keys, told):
    fsdp = {"state_dict_type": "FULL_STATE_DICT", **keys.get("fsdp_config", {})}
    advice = checkpoint_advice({"fsdp_version": 2, **keys, "fsdp_config": fsdp})
    assert bool(advice) is told
    assert checkpoint_advice({"adapter": "lora", "fsdp_version": 2, "fsdp_config": None}) is None


def test_every_fault_is_told_at_once():
    text = refusal(changed(AMOPO, amopo__beta=0, amopo__gamma=-1, amopo__lossy=1))
    assert len(text.splitlines()) == 3


def test_the_defaults_are_the_papers():
    amopo = parse_settings(AMoPOConfig, AMOPO["amopo"], "amopo")
    assert (amopo.beta, amopo.gamma, amopo.weighting, amopo.temperature) == (0.8, 2.0, "gaussian", 1.0)
    assert amopo.prompt_names == ["integrated", "helpfulness", "correctness"]
    assert parse_settings(AMoPOConfig, {**AMOPO["amopo"], "integrated": False}, "amopo").prompt_names == [
        "helpfulness",
        "correctness",
    ]
    modpo = parse_settings(MODPOConfig, MODPO["modpo"], "modpo")
    assert (modpo.beta, modpo.loss_type) == (0.1, "sigmoid")
    assert (modpo.objective_weight, modpo.margin_weights) == (0.5, [0.5])


def test_weights_need_not_sum_to_one():
    modpo = parse_settings(MODPOConfig, {**MODPO["modpo"], "weights": {"better": 1, "safer": -0.1}}, "modpo")
    assert modpo.margin_weights == [-0.1]


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert parse_settings(MODPOConfig, {**MODPO["modpo"], "beta": "1e-1"}, "modpo").beta == 0.1


def test_dotted_keys_fold_into_their_block():
    cfg = {"modpo.weights": {"a": 1}, "modpo.margins.safer.source": "column", "amopo.beta": 2, "amopo": {"gamma": 1}}
    fold_dotted_keys(cfg)
    assert cfg == {
        "modpo": {"weights": {"a": 1}, "margins": {"safer": {"source": "column"}}},
        "amopo": {"beta": 2, "gamma": 1},
    }
    with pytest.raises(ConfigError, match=r"`modpo.beta.x`: `beta` is not a mapping"):
        fold_dotted_keys({"modpo": {"beta": 1}, "modpo.beta.x": 2})


def test_other_keys_with_dots_stay_and_a_block_that_is_empty_is_filled():
    cfg = {"modpo": None, "modpo.weights": {"a": 1}, "trl.beta": 1, "modpo.margins": {}, 3: 4}
    fold_dotted_keys(cfg)
    assert cfg == {"modpo": {"weights": {"a": 1}, "margins": {}}, "trl.beta": 1, 3: 4}


def test_the_weights_of_margins_are_in_the_order_of_the_margins():
    margins = {name: {"source": "column"} for name in ("kind", "brief", "safe")}
    weights = {"safe": 0.1, "better": 1, "brief": 0.2, "kind": 0.3}
    modpo = parse_settings(MODPOConfig, {"objective": "better", "weights": weights, "margins": margins}, "modpo")
    assert modpo.margin_weights == [0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"deepspeed": "zero2.json"}, True),
        ({"fp16": True}, True),
        ({"optimizer": "adalomo"}, True),
        ({"optimizer": "galore_adamw_layerwise"}, True),
        ({"optimizer": "adamw_torch", "bf16": True}, False),
        ({}, False),
    ],
)
def test_a_step_can_be_skipped_where_the_package_makes_it(keys, refused):
    check_skipping(keys, "raise")
    MOPOPlugin().register(changed({**AMOPO, **keys}, amopo__on_bad_loss="raise"))
    skipping = changed({**AMOPO, **keys}, amopo__on_bad_loss="skip")
    if refused:
        assert "`on_bad_loss: skip` does not work with DeepSpeed" in refusal(skipping)
    else:
        MOPOPlugin().register(skipping)


THIRDS = dict.fromkeys(("helpfulness", "correctness", "integrated"), 1 / 3)


@pytest.mark.parametrize(
    "cfg",
    [
        changed(AMOPO, amopo__gamma=0, amopo__sft_coef=0, amopo__router_aux_loss_coef=0),
        changed(AMOPO, amopo__weighting=THIRDS),
        changed(AMOPO, amopo__weighting={**THIRDS, "helpfulness": 0, "correctness": 2 / 3}),
        changed(AMOPO, amopo={"dimensions": ["integrated", "n" * 200], "integrated": False}),
        changed(AMOPO, amopo__score_range=[-1e6, 1e6], context_parallel_size=1, sequence_parallel_degree=1),
        {**changed(AMOPO, amopo__layout="packed"), "attn_implementation": "sdpa", "flex_attention": True},
    ],
)
def test_a_setting_at_its_border_is_accepted(cfg):
    MOPOPlugin().register(copy.deepcopy(cfg))


def with_margin(**settings):
    return changed(MODPO, modpo__margins={"safer": settings})


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (changed(AMOPO, amopo__weighting={**THIRDS, "helpfulness": 0.3}), "the weights sum to 0.966667; they must"),
        (changed(AMOPO, amopo__weighting={**THIRDS, "helpfulness": True}), "the weight of helpfulness is True"),
        (changed(AMOPO, amopo__weighting={**THIRDS, "helpfulness": 10**400}), "it must be a finite number of at least"),
        (changed(AMOPO, amopo__score_range=[3, 3]), "the lowest score 3 is not below the highest 3"),
        (changed(AMOPO, amopo__score_range=[-2e6, 1]), "goes beyond 1e+06"),
        (changed(AMOPO, amopo__score_range=[1, 1.004]), "are the same number with two decimals"),
        (changed(AMOPO, amopo__dimensions=["n" * 201]), "has 201 characters"),
        (changed(AMOPO, gradient_checkpointing="offload_disk"), "`gradient_checkpointing: offload_disk` does not work"),
        (changed(AMOPO, cpo_alpha=0.1), "see `amopo.sft_coef`"),
        (
            {**changed(AMOPO, amopo__layout="packed"), "sage_attention": True},
            "does not work with the attention implementation 'sage_attention'",
        ),
        (with_margin(source="column", clip=[1, 1]), "the lowest reward 1 is not below the highest 1"),
        (with_margin(source="reward_model", path="x", head=True), "input should be a number, not true or false"),
        (with_margin(source="reward_model", path="x", batch_size=0), "`modpo.margins.safer.batch_size`"),
        (with_margin(source="callable", function="a:b", batch_size=0), "`modpo.margins.safer.batch_size`"),
        (with_margin(source="adapter", path="x", beta=0), "`modpo.margins.safer.beta`"),
        (
            changed(
                MODPO,
                modpo__weights={"better": 1, "safer": 1, "safer/rejected": 1},
                modpo__margins={key: {"source": "column"} for key in ("safer", "safer/rejected")},
            ),
            "the margin 'safer' logs the rewards of rejected responses as safer/rejected",
        ),
    ],
)
def test_a_setting_beyond_its_border_is_refused(cfg, words):
    assert words in refusal(copy.deepcopy(cfg))


def test_what_is_left_out_has_its_default():
    amopo = parse_settings(AMoPOConfig, AMOPO["amopo"], "amopo")
    assert (amopo.sft_coef, amopo.score_range, amopo.directive_position, amopo.loss_type) == (
        0,
        (1, 5),
        "before",
        "simpo",
    )
    modpo = parse_settings(MODPOConfig, MODPO["modpo"], "modpo")
    assert (modpo.reference, modpo.on_bad_loss, modpo.logits_budget, modpo.layout) == ("initial", "raise", 1.5, None)
    margin = modpo.margins["safer"]
    assert (margin.clip, margin.normalize, margin.scale, margin.field) == (None, "none", 1, None)
