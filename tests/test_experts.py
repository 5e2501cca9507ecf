"""Mixtures of experts train with a load-balancing loss, as TRL's preference trainers have it."""

import copy
from unittest import mock

import pytest
import torch
from conftest import CONFIGS, MIXTURES, SMOKE, build_model, host_trainer, ragged_pairs, smoke_config
from datasets import Dataset
from transformers import AutoConfig, GraniteMoeHybridConfig, Qwen3MoeConfig
from trl import DPOConfig, DPOTrainer

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.logprobs.attention import use_plain_attention, use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.layout import gives_aux_loss
from axolotl_mopo.logprobs.trees import Pair, pack, pad
from axolotl_mopo.training.collator import PairCollator

METHODS = ["amopo", "modpo"]


def aux_loss_and_gradient(model, batch):
    model.zero_grad()
    scores, aux_loss = LogProbComputer(model).with_aux_loss(model, batch)
    aux_loss.backward()
    return scores, aux_loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", list(MIXTURES))
def test_shared_tokens_count_as_often_as_in_padded_rows(architecture):
    system = [5, 6, 7, 8]
    pairs = [*ragged_pairs(), Pair([[*system, 20], [*system, 21, 22]], [9, 10, 11], [9, 10, 12, 13])]
    model = build_model(MIXTURES[architecture])
    _, padded, padded_gradient = aux_loss_and_gradient(model, pad(pairs, 0))
    use_tree_attention(model)
    scores, packed, gradient = aux_loss_and_gradient(model, pack(pairs))
    assert packed.item() == pytest.approx(padded.item(), abs=1e-5)
    assert padded.item() > 1
    for name, expected in padded_gradient.items():
        assert torch.allclose(gradient[name], expected, atol=1e-5), name
    assert torch.equal(scores.logps, LogProbComputer(model)(model, pack(pairs)).logps)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """The folder of a mixture's configuration and tokenizer, for weights that the run draws."""
    folder = tmp_path_factory.mktemp("experts")
    config = AutoConfig.from_pretrained(SMOKE / "model").to_dict()
    shape = {key: config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    Qwen3MoeConfig(
        **shape,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trainers(base, tmp_path_factory):
    """One trainer a method."""
    built = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        cfg = smoke_config(method, folder, base_model=str(base), micro_batch_size=3, max_grad_norm=1e9)
        if method == "amopo":
            cfg["amopo"]["weighting"] = "uniform"
        built[method] = host_trainer(cfg)
    built["modpo"].precompute(built["modpo"].model)
    return built


@pytest.fixture
def trainers_module(trainers):
    """Our trainers, which may be imported once Axolotl has built one."""
    from axolotl_mopo.training import base as module

    return module


def step(trainer, coefficient, packed=True, max_tokens=None):
    """Loss, gradients and metrics of one micro-batch."""
    trainer.aux_loss_coef = coefficient
    collator = PairCollator(0, packed, max_tokens)
    rows = [trainer.train_dataset[index] for index in (5, 2, 7)]
    (use_tree_attention if packed else use_plain_attention)(trainer.model)
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, collator(rows))
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: each.mean for name, each in trainer.train_window.pop(trainer.accelerator).items()}
    return loss.item(), gradients, metrics


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_balances_the_experts_in_both_layouts(trainers, method):
    trainer = trainers[method]
    assert trainer.aux_loss_coef == 0.001  # TRL's default
    without, _, metrics = step(trainer, 0)
    loss, gradients, balanced = step(trainer, 0.5)
    padded, padded_gradients, padded_metrics = step(trainer, 0.5, packed=False)
    assert "aux_loss" not in metrics
    assert 1.5 < balanced["aux_loss"] < 4  # of four experts, two a token
    assert loss == pytest.approx(without + 0.5 * balanced["aux_loss"], abs=1e-5)
    assert loss == pytest.approx(padded, abs=1e-4)
    assert balanced == pytest.approx(padded_metrics, abs=1e-3)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, padded_gradients[name], atol=1e-4), name
    assert gradients["model.layers.0.mlp.gate.weight"].abs().max() > 1e-4


def test_split_passes_balance_each_of_theirs_and_weigh_them_by_pairs(trainers):
    trainer = trainers["amopo"]
    rows = [trainer.train_dataset[index] for index in (5, 2, 7)]
    batch = PairCollator(0, True, 400)(rows)
    shape = [[len(one["pairs"]) for one in unit] for unit in batch["groups"]]
    assert max(map(len, shape)) > 1  # a pair that is split by its prompts
    without, *_ = step(trainer, 0, max_tokens=400)
    loss, _, metrics = step(trainer, 0.5, max_tokens=400)
    aux_losses = 0
    use_tree_attention(trainer.model)
    for unit in batch["groups"]:
        own = [LogProbComputer().with_aux_loss(trainer.model, one)[1].item() for one in unit]
        aux_losses += len(unit[0]["pairs"]) * sum(own) / len(own)
    assert loss - without == pytest.approx(0.5 * aux_losses / 3, abs=1e-5)
    assert metrics["aux_loss"] == pytest.approx(aux_losses / 3, abs=1e-5)


def test_evaluation_logs_the_balance_and_keeps_its_loss_free_of_it(trainers):
    trainer = trainers["modpo"]
    use_tree_attention(trainer.model)
    trainer.aux_loss_coef = 0.5
    balanced = trainer.evaluate()
    trainer.aux_loss_coef = 0.0
    without = trainer.evaluate()
    assert 1.5 < balanced["eval_aux_loss"] < 4
    assert balanced["eval_loss"] == pytest.approx(without["eval_loss"], abs=1e-6)
    assert "eval_aux_loss" not in without


def test_the_term_is_that_of_trls_dpo(tokenizer, tmp_path):
    """TRL's default coefficient, on the pair's two sequences."""
    config = MIXTURES["mixtral"]
    model = build_model(type(config)(**{**config.to_dict(), "vocab_size": 1024}))
    rows = Dataset.from_list(
        [{"prompt": f"What is {n}?", "chosen": f" It is {n} of them.", "rejected": " No idea."} for n in (3, 14)]
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model=model, ref_model=copy.deepcopy(model), args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        trainer.compute_loss(model, batch)
    (expected,) = trainer._metrics["train"]["aux_loss"]
    pairs = []
    for index in range(2):
        sides = []
        for row in (index, index + 2):
            real = batch["attention_mask"][row].bool()
            tokens, completion = (batch[name][row][real].tolist() for name in ("input_ids", "completion_mask"))
            sides.append((tokens, completion.index(1)))
        (chosen, start), (rejected, _) = sides
        pairs.append(Pair([chosen[:start]], chosen[start:], rejected[start:]))
    use_tree_attention(model)
    assert trainer.router_aux_loss_coef == 0.001
    _, found = LogProbComputer(model).with_aux_loss(model, pack(pairs))
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_a_model_without_experts_that_takes_the_argument_has_no_such_loss(trainers, trainers_module):
    """Granite's hybrid architecture answers with the number 0 where it is dense."""
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    dense = build_model(
        GraniteMoeHybridConfig(
            **shape,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=0,
            mamba_n_heads=4,
            layer_types=["attention"],
        )
    )
    (pair, *_) = ragged_pairs(1)
    assert not gives_aux_loss(dense, pair, torch.device("cpu"), packed=False)
    assert gives_aux_loss(build_model(MIXTURES["mixtral"]), pair, torch.device("cpu"), packed=False)
    trainer = trainers["amopo"]
    trainer.aux_loss_coef = 0.5
    with mock.patch.object(trainers_module, "gives_aux_loss", lambda *_: False):
        trainer.try_layout(trainer.model)
        assert trainer.aux_loss_coef == 0
        trainer.aux_loss_coef = 0.5
        method = trainer.method
        trainer.method = method.model_copy(update={"router_aux_loss_coef": 0.5})
        try:
            with pytest.raises(ConfigError, match="which has no load-balancing loss"):
                trainer.try_layout(trainer.model)
        finally:
            trainer.method = method


@pytest.mark.parametrize(
    ("coefficient", "reentrant", "refused"), [(None, True, True), (0, True, False), (1, False, False)]
)
def test_a_loss_that_would_have_no_gradient_is_refused(trainers, coefficient, reentrant, refused):
    trainer = trainers["amopo"]
    method = trainer.method
    trainer.method = method.model_copy(update={"router_aux_loss_coef": coefficient})
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    try:
        with mock.patch.multiple(trainer.args, **settings):
            if refused:
                with pytest.raises(
                    ConfigError,
                    match=r"`gradient_checkpointing_kwargs\.use_reentrant: true` the load-balancing",
                ):
                    trainer._choose_aux_loss_coef()
            else:
                assert trainer._choose_aux_loss_coef() == coefficient
    finally:
        trainer.method = method


def test_a_coefficient_without_experts_is_refused(trainers):
    trainer = trainers["amopo"]
    mixture, method = trainer.model, trainer.method
    trainer.model, trainer.method = build_model(CONFIGS["llama"]), method.model_copy(update={"router_aux_loss_coef": 1})
    try:
        with pytest.raises(ConfigError, match="LlamaForCausalLM, which has no load-balancing loss"):
            trainer._choose_aux_loss_coef()
    finally:
        trainer.model, trainer.method = mixture, method
