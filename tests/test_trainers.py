"""Both trainers as Axolotl builds them: steps, adapters, metrics, evaluation, resume, several processes."""

import copy
import dataclasses
import gc
import math
import random
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import LORA_WITH_DROPOUT, ROOT, host_trainer, smoke_config, stir
from torch.overrides import TorchFunctionMode
from transformers import MambaConfig, TrainerCallback

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.logprobs.computer import CompletionLogProbs
from axolotl_mopo.training.metrics import MetricWindow
from axolotl_mopo.training.microbatching import Part
from axolotl_mopo.training.precompute import Constants

FIXED = {"amopo": {"amopo": {"dimensions": ["helpfulness", "correctness"], "weighting": "uniform"}}, "modpo": {}}
METHODS = ["amopo", "modpo"]


@pytest.fixture
def build(tmp_path, prepared):
    """Build a method's trainer from its smoke YAML with some keys replaced."""

    def build(method, name="run", **overrides):
        cfg = smoke_config(method, tmp_path / name, **{"dataset_prepared_path": str(prepared), **overrides})
        random.seed(0)
        torch.manual_seed(0)  # Axolotl does not seed random initial weights
        return host_trainer(cfg)

    return build


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_step(trainer):
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return training_logs(trainer)[0], gradients.first


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("adapter", [{}, LORA_WITH_DROPOUT], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_accumulating_two_batches_of_two_is_one_batch_of_four(build, method, adapter):
    steps = {"max_steps": 1, "max_grad_norm": 1e9, **FIXED[method], **adapter}
    log, gradients = first_step(build(method, "two", micro_batch_size=2, gradient_accumulation_steps=2, **steps))
    other_log, other_gradients = first_step(
        build(method, "four", micro_batch_size=4, gradient_accumulation_steps=1, **steps)
    )
    assert log["loss"] == pytest.approx(other_log["loss"], abs=1e-6)
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        assert log[name] == pytest.approx(other_log[name], rel=1e-5, abs=1e-5)
    assert_same_gradients(gradients, other_gradients)


def method_block(method, **settings):
    """The smoke YAML's block with some settings besides."""
    cfg = yaml.safe_load((ROOT / "example_configs" / f"smoke-{method}.yaml").read_text())
    return {method: {**cfg[method], **settings}}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("method", "limit"), [("amopo", 2000), ("amopo", 480), ("amopo", 1), ("modpo", 150)])
def test_a_limit_of_tokens_changes_no_step(build, method, limit, layout, host_log):
    """At 2000 several pairs share a pass, at 480 some are split by their prompts, at 1 every prompt stands alone."""
    common = {"max_steps": 1, "micro_batch_size": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 1e9}
    own = {"layout": layout, **({"sft_coef": 0.3} if method == "amopo" else {})}
    log, gradients = first_step(build(method, "whole", **common, **method_block(method, **own)))
    limited = build(method, "limited", **common, **method_block(method, **own, max_tokens_per_pass=limit))
    forwards = []
    limited.model.register_forward_pre_hook(lambda model, args, kwargs: forwards.append(kwargs), with_kwargs=True)
    other_log, other_gradients = first_step(limited)
    assert len(forwards) > 2
    if limit == 480 and layout == "packed":
        units = [len(unit) for batch in limited.get_train_dataloader() for unit in batch["groups"]]
        assert {1, 2} <= set(units)
    if limit > 1:
        assert all(kwargs["input_ids"].numel() <= limit for kwargs in forwards)
    if method == "amopo" and limit <= 480:
        assert "are split by their prompts to fit into max_tokens_per_pass" in host_log.text
    assert log.keys() == other_log.keys()
    for name in log.keys() - {"epoch"}:
        assert log[name] == pytest.approx(other_log[name], rel=1e-4, abs=1e-5), name
    assert_same_gradients(gradients, other_gradients)
    assert limited.state.total_flos > 0
    whole, limited = (
        build(method, name, **method_block(method, **own, **settings)).evaluate()
        for name, settings in (("a", {}), ("b", {"max_tokens_per_pass": limit}))
    )
    assert whole["eval_loss"] == pytest.approx(limited["eval_loss"], rel=1e-5)


class Reads(TorchFunctionMode):
    """Notes every call that would make the CPU wait for an accelerator's numbers."""

    waiting = ("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal", "__bool__", "__int__")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        chosen = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [part for part in (chosen if isinstance(chosen, tuple) else (chosen,)) if torch.is_tensor(part)]
        repeats = name == "repeat_interleave" and torch.is_tensor(args[1])
        if name in self.waiting or repeats or any(mask.dtype == torch.bool for mask in masks):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "settings"), [("amopo", {}), ("amopo", {"max_tokens_per_pass": 480}), ("modpo", {})]
)
def test_a_step_waits_for_no_number(build, method, settings):
    trainer = build(method, max_steps=1, **method_block(method, **settings))
    trainer.train()  # leaves everything as a step finds it
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    with Reads() as reads:
        for _ in range(2):
            trainer.training_step(trainer.model, batch)
    assert reads.seen == []
    assert trainer.args.logging_nan_inf_filter is False  # with it, the Trainer would check every loss
    x = torch.ones(2)
    for read in (x.sum().item, x.tolist, x.cpu, lambda: x[x > 0], lambda: bool(x[0]), x.nonzero):
        with Reads() as reads:
            read()
        assert len(reads.seen) == 1


@pytest.mark.parametrize("every", [None, 2])
def test_garbage_is_collected_when_the_host_is_asked_to_and_never_else(build, every):
    trainer = build("amopo", max_steps=4, eval_strategy="no", eval_steps=None, gc_collect_steps=every)
    steps, collected = [], []
    gc.collect()
    gc.disable()  # what is left are the explicit ones
    note = lambda phase, info: collected.append(trainer.state.global_step) if phase == "start" else None  # noqa: E731
    gc.callbacks.append(note)
    trainer.add_callback(Marks(steps))
    try:
        trainer.train()
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert steps == [0, 1, 2, 3]
    between = [step for step in collected if 0 < step < 4]
    assert bool(between) is (every is not None)


class Marks(TrainerCallback):
    """Notes where steps begin."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_the_hosts_own_log_softmax_is_in_use(build):
    """Axolotl puts its GPU kernel in the place of TRL's function when a model is loaded."""
    from axolotl.monkeypatch.trainer import utils as host

    from axolotl_mopo.logprobs.log_softmax import selective_log_softmax
    from axolotl_mopo.training.base import choose_log_softmax

    assert (
        build("amopo").logprob_computer.log_softmax is choose_log_softmax(torch.device("cpu")) is selective_log_softmax
    )
    assert choose_log_softmax(torch.device("cuda")) is host.selective_log_softmax


def test_rows_of_like_length_are_grouped(build):
    def spread(name, **overrides):
        trainer = build("modpo", name, micro_batch_size=8, **overrides)
        lengths = trainer.train_dataset["length"]
        assert lengths == [
            len(row["prompt_input_ids"][0]) + len(row["chosen_input_ids"]) + len(row["rejected_input_ids"])
            for row in trainer.train_dataset
        ]
        batches = [
            sorted(lengths[number] for number in batch["pair_index"].tolist())
            for batch in trainer.get_train_dataloader()
        ]
        return sum(batch[-1] - batch[0] for batch in batches)

    assert spread("grouped", group_by_length=True) < spread("random") / 2


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_gradient(build, method):
    _, gradients = first_step(build(method, "plain", max_steps=1, **FIXED[method]))
    _, other = first_step(build(method, "checkpointing", max_steps=1, gradient_checkpointing=True, **FIXED[method]))
    assert_same_gradients(gradients, other)


@pytest.mark.parametrize("adapter", [{}, LORA_WITH_DROPOUT], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_of_held_out_pairs(build, method, adapter):
    trainer = build(method, max_steps=12, learning_rate=0.005, **adapter)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    loss_before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss_before
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved) if adapter else len(moved) == len(before)


def test_modpos_reference_is_the_policy_before_its_first_step(build):
    trainer = build("modpo", max_steps=2, **LORA_WITH_DROPOUT)
    stir(trainer.model, 0.5)
    trainer.train()
    first = training_logs(trainer)[0]
    assert first["rewards/collective_margins"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(-first["margins/correctness"], rel=1e-5)
    models = [m for m in vars(trainer).values() if isinstance(m, torch.nn.Module)]
    assert all(m is trainer.model for m in models)


def test_modpos_log_explains_its_rewards(build):
    trainer = build("modpo", max_steps=4, modpo={**modpo_block(), "weights": {"overall": 0.25, "correctness": 0.5}})
    trainer.train()
    last = training_logs(trainer)[-1]
    for side in ("chosen", "rejected"):
        implied = (last[f"rewards/collective_{side}"] - 0.5 * last[f"margins/correctness/{side}"]) / 0.25
        assert last[f"rewards/{side}"] == pytest.approx(implied, rel=1e-4)
    assert last["rewards/collective_margins"] != 0


def test_modpo_without_margins_is_dpo(build):
    trainer = build("modpo", max_steps=3, modpo={"objective": "overall", "weights": {"overall": 1}})
    trainer.train()
    first, _, last = training_logs(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["rewards/margins"] == last["rewards/collective_margins"] != 0


def modpo_block():
    return {"objective": "overall", "beta": 0.1, "margins": {"correctness": {"source": "column"}}}


def test_dropout_is_off_in_training(build):
    trainer = build("amopo", **LORA_WITH_DROPOUT)
    assert all(m.p == 0 for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_the_mean_over_pairs_for_any_batch_size(build, method):
    one, ragged = (build(method, str(size), eval_batch_size=size).evaluate() for size in (1, 7))
    metrics = {name for name in one if not name.endswith(("runtime", "per_second", "epoch", "preparation_time"))}
    assert {"eval_loss", "eval_rewards/chosen", "eval_rewards/accuracies", "eval_logps/chosen"} <= metrics
    for name in metrics:
        assert one[name] == pytest.approx(ragged[name], rel=1e-4, abs=1e-5), name


def test_amopos_metrics_of_each_dimension(build):
    metrics = build("amopo").evaluate()
    names = ["integrated", "helpfulness", "correctness", "instruction_following"]
    assert sum(metrics[f"eval_weights/{name}"] for name in names) == pytest.approx(1)
    for name in names:
        assert 0 <= metrics[f"eval_rewards/accuracies/{name}"] <= 1
        assert f"eval_rewards/margins/{name}" in metrics
        assert metrics[f"eval_weights_std/{name}"] >= 0


def test_amopos_draws_are_only_in_training(build):
    trainer = build("amopo", max_steps=1)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    trainer.current_gradient_accumulation_steps = 2
    assert trainer.training_step(trainer.model, batch) != trainer.training_step(trainer.model, batch)
    trainer.model.eval()
    assert trainer.compute_loss(trainer.model, batch) == trainer.compute_loss(trainer.model, batch)


def test_every_micro_batch_of_every_rank_and_run_has_draws_of_its_own(build, monkeypatch):
    trainer = build("amopo")
    state, shared = trainer.state, type(trainer).__mro__[1]
    monkeypatch.setattr(shared, "training_step", lambda *args: None)

    def drawn(seed, rank, moments):
        """What the micro-batches at these optimizer steps draw."""
        monkeypatch.setattr(trainer.args, "seed", seed)
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        trainer._micro_batch = (0, 0)
        for state.global_step in moments:
            trainer.training_step(None, {})
            yield torch.randn(3, generator=trainer._draw_generator()).tolist()

    moments = [0, 0, 0, 1, 1, 1, 2]
    runs = [(1, 0), (1, 1), (2, 0), (11, 0), (1, 10)]
    draws = [draw for run in runs for draw in drawn(*run, moments)]
    assert len({tuple(draw) for draw in draws}) == len(runs) * len(moments)
    assert list(drawn(1, 1, moments[3:])) == draws[len(moments) + 3 : 2 * len(moments)]  # as a run that is resumed


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_where_an_undisturbed_one_does(build, method):
    steps = {"max_steps": 6, "save_strategy": None, "save_steps": 3, "gradient_accumulation_steps": 2}
    trainer = build(method, **steps)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
    resumed = build(method, **steps)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for (name, p), (_, q) in zip(trainer.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_every_dimension_and_option_of_amopo_trains(build):
    for block in (
        {"weighting": "mean", "temperature": 0.1},
        {"weighting": {"integrated": 0.5, "helpfulness": 0.5}},
        {"loss_type": "orpo", "beta": 0.1},
        {"sft_coef": 0.5, "gamma": 0},
        {"integrated": False},
    ):
        trainer = build("amopo", max_steps=1, amopo={"dimensions": ["helpfulness"], **block})
        trainer.train()
        assert training_logs(trainer)[0]["loss"] > 0


def test_the_sft_term_is_the_mean_nll_of_a_chosen_token(build):
    without, doubled = (
        build("amopo", str(coef), amopo={"dimensions": ["helpfulness"], "sft_coef": coef}).evaluate() for coef in (0, 2)
    )
    trainer = build("amopo", amopo={"dimensions": ["helpfulness"]})
    nll = [
        trainer.evaluate(trainer.eval_dataset.select([i]))["eval_logps/chosen"]
        / len(trainer.eval_dataset[i]["chosen_input_ids"])
        for i in range(len(trainer.eval_dataset))
    ]
    assert doubled["eval_loss"] - without["eval_loss"] == pytest.approx(-2 * sum(nll) / len(nll), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_stays_close_to_float32(build, method):
    trainer = build(method)
    dataset = trainer.eval_dataset
    exact = trainer.evaluate()
    trainer.model.to(torch.bfloat16)
    if method == "modpo":
        trainer.eval_dataset = dataset
    rounded = trainer.evaluate()
    assert rounded["eval_loss"] == pytest.approx(exact["eval_loss"], rel=0.02)
    assert rounded["eval_logps/chosen"] == pytest.approx(exact["eval_logps/chosen"], rel=0.01)


def start_anew():
    """Make accelerate forget the precision. Axolotl's loggers still need a state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_mixed_precision_trains_float32_weights(build, method):
    """Axolotl refuses `bf16: true` on a CPU, so the trainer is rebuilt with the argument changed."""
    plain = build(method, max_steps=3, gradient_checkpointing=True, **FIXED[method])
    model, data = copy.deepcopy(plain.model), plain.train_dataset
    plain.train()
    start_anew()
    trainer = type(plain)(
        model,
        args=dataclasses.replace(plain.args, bf16=True, use_cpu=True),
        train_dataset=data,
        processing_class=plain.processing_class,
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.data_collator.packed
    trainer.train()
    start_anew()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for entry, exact in zip(training_logs(trainer), training_logs(plain), strict=True):
        assert entry["loss"] == pytest.approx(exact["loss"], rel=0.03)


def test_a_model_that_cannot_take_trees_trains_in_padded_rows(build, tmp_path, tokenizer, host_log):
    folder = tmp_path / "mamba"
    MambaConfig(
        vocab_size=1024, hidden_size=32, num_hidden_layers=1, pad_token_id=0, eos_token_id=2, bos_token_id=1
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common = {"base_model": str(folder), "attn_implementation": None}
    with pytest.raises(ConfigError, match="`layout: packed`: MambaForCausalLM cannot be trained in packed trees"):
        build("amopo", **common, **method_block("amopo", layout="packed"))
    trainer = build("amopo", max_steps=1, **common)
    assert "padded rows" in host_log.text
    assert "MambaForCausalLM" in host_log.text
    trainer.train()
    assert training_logs(trainer)[0]["loss"] > 0


def made_up_scores(completions):
    """Scores that no two completions share."""
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 40, (completions,), generator=rng)
    logps = -lengths * torch.rand(completions, generator=rng) * 3
    return CompletionLogProbs(logps, *torch.rand(2, completions, generator=rng), lengths)


@pytest.mark.parametrize("weighting", ["mean", "uniform", {"integrated": 0.2, "helpfulness": 0.7, "correctness": 0.1}])
def test_amopos_loss_and_log_are_those_of_its_settings(build, weighting):
    settings = {"beta": 1.3, "gamma": 0.7, "temperature": 0.2, "sft_coef": 0.4}
    trainer = build("amopo", amopo={"dimensions": ["helpfulness", "correctness"], "weighting": weighting, **settings})
    trainer.model.train()
    scores, names = made_up_scores(12), ["integrated", "helpfulness", "correctness"]
    logps, prob_mean, _, lengths = (values.view(2, 3, 2) for values in scores)
    weights = {
        "mean": (prob_mean.sum(-1) / 0.2).softmax(-1),
        "uniform": torch.full((2, 3), 1 / 3),
    }.get(str(weighting), torch.tensor([[0.2, 0.7, 0.1]] * 2))
    each = logps / lengths
    odds = each - (1 - each.exp()).log()
    dimension_losses = {
        "simpo": -(1.3 * (each[..., 0] - each[..., 1]) - 0.7).sigmoid().log(),
        "orpo": -each[..., 0] - 1.3 * (odds[..., 0] - odds[..., 1]).sigmoid().log(),
    }
    for loss_type, values in dimension_losses.items():
        trainer.method = trainer.method.model_copy(update={"loss_type": loss_type})
        losses, metrics = trainer.pair_losses(scores, Part(torch.tensor([2, 0]), 3, None, None))
        assert torch.allclose(losses, (weights * values).sum(-1) - 0.4 * each[..., 0].mean(-1), rtol=1e-4)
    for dimension, name in enumerate(names):
        margins = 1.3 * (each[:, dimension, 0] - each[:, dimension, 1])
        assert torch.allclose(metrics[f"weights/{name}"], weights[:, dimension], atol=1e-6)
        assert torch.allclose(metrics[f"rewards/margins/{name}"], margins, rtol=1e-4)
        assert torch.equal(metrics[f"rewards/accuracies/{name}"], margins > 0)
    for side, name in enumerate(("chosen", "rejected")):
        assert torch.allclose(metrics[f"rewards/{name}"], 1.3 * (weights * each[..., side]).sum(-1), rtol=1e-4)
        assert torch.allclose(metrics[f"logps/{name}"], logps[..., side].mean(-1), rtol=1e-4)


def test_modpos_loss_and_log_are_those_of_its_settings_and_of_the_pairs_constants(build):
    margins = {"correctness": {"source": "column"}, "brief": {"source": "length"}}
    weights = {"overall": 0.3, "correctness": 0.5, "brief": -0.2}
    trainer = build("modpo", modpo={**modpo_block(), "weights": weights, "margins": margins, "beta": 0.4})
    rng = torch.Generator().manual_seed(5)
    reference, rewards = -30 * torch.rand(5, 2, generator=rng), torch.randn(5, 2, 2, generator=rng)
    trainer._tables = Constants(reference, rewards)
    scores = made_up_scores(4)
    part = Part(torch.tensor([2, 0]), 3, None, torch.tensor([3, 4]))
    policy, reference, rewards = scores.logps.view(2, 2), reference[[3, 4]], rewards[[3, 4]]
    collective = 0.4 * (policy - reference)
    implied = (collective - 0.5 * rewards[..., 0] + 0.2 * rewards[..., 1]) / 0.3
    gap = implied[:, 0] - implied[:, 1]
    for loss_type, expected in (("sigmoid", (1 + (-gap.double()).exp()).log().float()), ("hinge", (1 - gap).relu())):
        trainer.method = trainer.method.model_copy(update={"loss_type": loss_type})
        losses, metrics = trainer.pair_losses(scores, part)
        assert torch.allclose(losses, expected, rtol=1e-4, atol=1e-6)
    named = {
        "rewards/": implied,
        "rewards/collective_": collective,
        "logps/": policy,
        "margins/correctness/": rewards[..., 0],
        "margins/brief/": rewards[..., 1],
    }
    for head, values in named.items():
        for side, name in enumerate(("chosen", "rejected")):
            assert torch.allclose(metrics[f"{head}{name}"], values[:, side], rtol=1e-4), head
    for margin, name in enumerate(margins):
        assert torch.equal(metrics[f"margins/{name}"], rewards[:, 0, margin] - rewards[:, 1, margin])
    assert torch.equal(metrics["rewards/accuracies"], gap > 0)
    trainer.train_window.add(metrics)
    spreads = {name for name in trainer._pop_metrics(trainer.train_window) if "_std" in name}
    assert spreads == {"rewards/margins_std", "margins_std/correctness", "margins_std/brief"}


def test_a_window_averages_over_pairs():
    window, accelerator = MetricWindow(), Accelerator(cpu=True)
    assert window.pop(accelerator) == {}
    window.add({"loss": torch.tensor([1.0, 2.0, 3.0]), "accuracy": torch.tensor([True, False, True])})
    window.add({"loss": torch.tensor([6.0]), "accuracy": torch.tensor([True])})
    popped = window.pop(accelerator)
    assert popped["loss"].mean == 3
    assert popped["loss"].std == pytest.approx(3.5**0.5)
    assert popped["accuracy"].mean == 0.75
    assert window.pop(accelerator) == {}


def test_a_window_forgets_what_came_since_its_mark_and_nothing_else():
    window, accelerator = MetricWindow(), Accelerator(cpu=True)
    window.add({"loss": torch.tensor([1.0, 2.0])})
    window.mark()
    window.add({"loss": torch.tensor([6.0])})
    window.rewind()
    window.add({"loss": torch.tensor([6.0])})
    window.mark()
    window.add({"loss": torch.tensor([math.nan, 1.0])})
    window.rewind()
    assert window.pop(accelerator)["loss"].mean == 3
    window.mark()
    window.add({"loss": torch.tensor([1.0])})
    window.rewind()
    assert window.pop(accelerator) == {}


def test_numbers_that_are_all_the_same_have_a_spread_of_zero():
    """Their variance is a difference of rounded sums, which is negative here, and would be positive for others."""
    for value in (0.1, 0.3, 1e3 + 0.1):
        window = MetricWindow()
        for _ in range(7):
            window.add({"loss": torch.tensor([value, value, value], dtype=torch.float64)})
        mean, std = window.pop(Accelerator(cpu=True))["loss"]
        assert mean == pytest.approx(value)
        assert isinstance(std, float)
        assert std == pytest.approx(0, abs=1e-4)


def test_a_small_spread_of_large_numbers_is_kept():
    window = MetricWindow()
    for number in range(50):
        window.add({"logps": torch.tensor([-4000.0, -4000.5]) + number % 2})
    assert window.pop(Accelerator(cpu=True))["logps"].std == pytest.approx((0.5**2 + 0.25**2) ** 0.5, rel=1e-5)
