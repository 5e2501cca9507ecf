"""What a model does at random in training is off, or the run is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, MIXTURES, SHAPE, SMOKE, build_model, host_trainer, ragged_pairs, smoke_config
from test_engine import score
from transformers import AutoConfig, OPTConfig, PersimmonConfig

from axolotl_mopo.errors import ConfigError, NoiseError
from axolotl_mopo.logprobs.layout import choose_layout, turn_off_noise
from axolotl_mopo.logprobs.trees import pad
from axolotl_mopo.training.pair_logprobs import separate_model

SMALL = {key: value for key, value in SHAPE.items() if key not in ("intermediate_size", "num_key_value_heads")}
NOISY = {
    "llama": (CONFIGS["llama"], {"attention_dropout": 0.5}),
    "mistral": (CONFIGS["mistral"], {"attention_dropout": 0.5}),
    "mixtral": (MIXTURES["mixtral"], {"router_jitter_noise": 0.3}),
    "opt": (OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=32), {"layerdrop": 0.5, "attention_dropout": 0.5}),
}


def noisy_model(name):
    config, changes = NOISY[name]
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    return build_model(config).train()


@pytest.mark.parametrize("name", list(NOISY))
def test_noise_is_turned_off_wherever_a_layer_keeps_it(name):
    model, batch = noisy_model(name), pad(ragged_pairs(), 0)

    def training_logps():
        model.train()
        return score(model, batch).logps

    assert not torch.allclose(training_logps(), training_logps(), atol=1e-3)
    before = model.config.to_json_string()
    turn_off_noise(model)
    logps = training_logps()
    assert torch.equal(logps, training_logps())
    assert torch.allclose(logps, score(model.eval(), batch).logps, atol=1e-5)
    assert model.config.to_json_string() == before


def test_noise_is_told_from_other_numbers_by_its_name():
    module = torch.nn.Module()
    noise = ("attention_dropout", "dropout", "drop_path_rate", "droppath", "layerdrop", "layer_drop", "jitter_noise")
    noise += ("input_jitter_noise", "moe_jitter_eps")
    others = ("router_jitter_noise", "eps", "scaling", "jitter")
    for name in noise + others:
        setattr(module, name, 0.5)
    module.dropout_rank = 3
    module.layer = torch.nn.Sequential(torch.nn.Dropout(0.3))
    turn_off_noise(module)
    assert module.layer[0].p == 0
    assert {name: getattr(module, name) for name in noise} == dict.fromkeys(noise, 0.0)
    assert {name: getattr(module, name) for name in others} == dict.fromkeys(others, 0.5)
    assert module.dropout_rank == 3


def test_a_model_that_gives_other_numbers_in_training_each_time_the_same_is_refused():
    model = build_model(CONFIGS["llama"])
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output * 1.5 if module.training else output
    )
    with pytest.raises(NoiseError, match=r"differ by 0 between two training passes, and by .* training and evaluation"):
        choose_layout(model, model, ragged_pairs())


def test_noise_that_stays_on_is_found():
    """Persimmon reads its configuration in every pass."""
    config = PersimmonConfig(**SMALL, intermediate_size=48, attention_dropout=0.5, hidden_dropout=0.0)
    model = build_model(config)
    turn_off_noise(model)
    with pytest.raises(NoiseError, match=r"PersimmonForCausalLM differ by .* between two training passes"):
        choose_layout(model, model, ragged_pairs())


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tokenizer):
    """A run in padded rows, which hand their attention its dropout."""
    folder = tmp_path_factory.mktemp("noise")
    config = AutoConfig.from_pretrained(SMOKE / "model")
    config.attention_dropout = 0.6
    config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    block = {"dimensions": ["helpfulness", "correctness"], "weighting": "uniform", "layout": "padded"}
    trainer = host_trainer(smoke_config("amopo", folder, base_model=str(folder / "model"), amopo=block))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.25)
    return trainer


def test_a_margins_model_that_adds_noise_is_refused_with_its_own_fix(tmp_path):
    config = PersimmonConfig(**SMALL, intermediate_size=48, attention_dropout=0.5, hidden_dropout=0.0)
    build_model(config).save_pretrained(tmp_path)
    names = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    rows = [dict(zip(names, pair[:3], strict=True)) for pair in ragged_pairs()]
    policy = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))
    with (
        pytest.raises(
            ConfigError, match=r"cannot compute rewards: .* adds noise in training .* in its own config\.json"
        ),
        separate_model(str(tmp_path), build_model(CONFIGS["llama"]), torch.float32, policy, rows),
    ):
        pass


def test_a_little_noise_is_found_in_half_precision():
    """Less than what rounding allows between two layouts, but two passes of one layout round alike."""
    model = build_model(CONFIGS["llama"], dtype=torch.bfloat16)
    choose_layout(model, model, ragged_pairs())
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: torch.nn.functional.dropout(output, 0.002, training=module.training)
    )
    with pytest.raises(NoiseError):
        choose_layout(model, model, ragged_pairs())


def test_a_run_with_attention_dropout_trains_without_it(trainer, tmp_path):
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, inputs).item() for _ in range(2)]
    assert losses[0] == losses[1]
    trainer.save_model(str(tmp_path))
    assert AutoConfig.from_pretrained(tmp_path).attention_dropout == 0.6


def test_a_run_whose_model_adds_noise_of_its_own_is_refused(trainer):
    head = trainer.model.get_output_embeddings()
    noise = head.register_forward_pre_hook(
        lambda module, args: torch.nn.functional.dropout(args[0], 0.5, training=module.training)
    )
    try:
        with pytest.raises(ConfigError, match=r"LlamaForCausalLM differ by .* adds noise in training"):
            trainer.try_layout(trainer.model)
    finally:
        noise.remove()
