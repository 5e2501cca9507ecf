"""Vision-language models trained on texts alone: layout, log-probs, gradients, whole runs, and what is refused."""

import copy
import json

import pytest
import torch
from conftest import LORA, SHAPE, SMOKE, build_model, host_trainer, ragged_pairs, smoke_config
from test_config import AMOPO, MODPO, changed, refusal
from test_engine import assert_same, score, scores_and_gradients, with_fine_norms
from test_margins import computed, logps
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma4Config,
    Llama4Config,
    Mistral3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from axolotl_mopo.logprobs.attention import TREE_PREFIX, plain_implementation, use_plain_attention, use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.layout import Layout, choose_layout, why_not_trees
from axolotl_mopo.logprobs.trees import pack, pad
from axolotl_mopo.plugin import MOPOPlugin

TEXT = {**SHAPE, "head_dim": 8}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 8}
QWEN_TOWER |= {"out_hidden_size": 32, "num_position_embeddings": 16}
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_TOKENS = {"image_token_id": 93, "video_token_id": 94, "vision_start_token_id": 95, "vision_end_token_id": 96}
LLAMA4_TEXT = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6, "floor_scale": 4}
LLAMA4_TOWER = {**TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
LAYERS = ["sliding_attention", "full_attention"]

PACKED = {
    "gemma3": Gemma3Config(
        text_config={**TEXT, "sliding_window": 5, "layer_types": LAYERS},
        vision_config={**TOWER, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        boi_token_index=94,
        eoi_token_index=95,
        image_token_id=96,
    ),
    "gemma4": Gemma4Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "global_head_dim": 8,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "layer_types": LAYERS * 2,
            "sliding_window": 5,
            "use_bidirectional_attention": "vision",
        },
        vision_config={**TOWER, "num_key_value_heads": 2, "head_dim": 8},
        audio_config=None,
    ),
    "mistral3": Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={**TOWER, "model_type": "pixtral", "head_dim": 8},
        image_token_index=96,
    ),
    "qwen2_vl": Qwen2VLConfig(
        text_config=QWEN_TEXT,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
        **QWEN_TOKENS,
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(
        text_config=QWEN_TEXT, vision_config={**QWEN_TOWER, "fullatt_block_indexes": [0]}, **QWEN_TOKENS
    ),
    "qwen3_vl": Qwen3VLConfig(
        text_config=QWEN_TEXT, vision_config={**QWEN_TOWER, "deepstack_visual_indexes": [0]}, **QWEN_TOKENS
    ),
}
PADDED = {
    "llama4": Llama4Config(
        text_config={**LLAMA4_TEXT, "no_rope_layers": [1, 0]}, vision_config=LLAMA4_TOWER, image_token_index=96
    ),
    "qwen3_5": Qwen3_5Config(
        text_config={**TEXT, "layer_types": ["linear_attention", "full_attention"], "use_cache": False},
        vision_config=QWEN_TOWER,
        **QWEN_TOKENS,
    ),
}
FULL_LLAMA4 = Llama4Config(
    text_config={**LLAMA4_TEXT, "layer_types": ["full_attention"] * 2}, vision_config=LLAMA4_TOWER, image_token_index=96
)
TEXT_LINEARS = r"(?!.*(vision|visual)).*\.(up|down|gate|q|k|v|o)_proj"


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_equals_padded_in_float64(architecture):
    model, tolerance = build_model(PACKED[architecture], dtype=torch.float64), 1e-8
    if architecture == "gemma4":
        tolerance = 1e-5  # of its norms, which round to float32, some have no weight
    else:
        model = with_fine_norms(model, architecture)
    assert choose_layout(model, model, ragged_pairs()) == Layout()
    padded = scores_and_gradients(model, pad(ragged_pairs(), 0))
    assert not [name for name in padded[1] if "vision" in name or "visual" in name]
    use_tree_attention(model)
    assert_same(scores_and_gradients(model, pack(ragged_pairs())), padded, tolerance)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2_5_vl"])
def test_packed_equals_padded_with_eager_attention(architecture):
    model = build_model(PACKED[architecture], "eager")
    padded = scores_and_gradients(model, pad(ragged_pairs(), 0))
    use_tree_attention(model)
    assert_same(scores_and_gradients(model, pack(ragged_pairs())), padded, 1e-4)


@pytest.mark.parametrize("architecture", [*PACKED, *PADDED])
def test_every_layout_equals_one_plain_forward_for_each_sequence(architecture):
    config = {**PACKED, **PADDED}[architecture]
    model = build_model(config, dtype=torch.float64)
    sequences = [(p, c) for pair in ragged_pairs() for p in pair.prompts for c in (pair.chosen, pair.rejected)]
    with torch.no_grad():
        logits = [model(torch.tensor([p + c]), use_cache=False).logits[0, len(p) - 1 : -1] for p, c in sequences]
        targets = [torch.tensor(completion)[:, None] for _, completion in sequences]
        expected = torch.stack(
            [each.log_softmax(-1).gather(-1, ids).sum() for each, ids in zip(logits, targets, strict=True)]
        )
        for computer in (score, LogProbComputer(model), LogProbComputer(model, 1e4)):
            assert torch.allclose(computer(model, pad(ragged_pairs(), 0)).logps, expected, rtol=0, atol=1e-6)
            if architecture in PACKED:
                use_tree_attention(model)
                assert torch.allclose(computer(model, pack(ragged_pairs())).logps, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PADDED["llama4"], "it has layers of type chunked_attention"),
        (FULL_LLAMA4, "its attention scales a query by its place in the row"),
        (PADDED["qwen3_5"], "its attention does not go through transformers' AttentionInterface"),
    ],
)
def test_other_decoders_get_padded_rows_with_the_reason(config, reason):
    model = build_model(config)
    assert choose_layout(model, model, ragged_pairs()) == Layout(why_not_packed=reason)


def test_a_model_with_an_encoder_is_padded():
    model = build_model(PACKED["gemma3"])
    model.config.is_encoder_decoder = True
    assert why_not_trees(model) == "it has an encoder"


def test_a_decoder_with_another_config_than_the_models_is_padded():
    model = build_model(PACKED["gemma3"])
    model.model.language_model.config = copy.deepcopy(model.config.text_config)
    assert why_not_trees(model) == "it has no text decoder with a config of its own"


def test_the_vision_part_keeps_its_attention_and_images_are_seen_as_before():
    model = build_model(PACKED["gemma3"])
    ids = torch.tensor([[5, 94, 96, 96, 96, 96, 95, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 96).long()}
    parts = (model.config, model.config.vision_config, model.config.text_config)
    with torch.no_grad():
        before = model(**inputs).logits
        use_tree_attention(model)
        assert plain_implementation(model) == "sdpa"
        assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", f"{TREE_PREFIX}sdpa"]
        assert torch.equal(model(**inputs).logits, before)
        use_plain_attention(model)
    assert [part._attn_implementation for part in parts] == ["sdpa"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a tiny model of an architecture with the smoke tokenizer, as Axolotl loads it from a folder."""
    made = {}

    def save(architecture, seed=0):
        if (architecture, seed) in made:
            return made[architecture, seed]
        path = tmp_path_factory.mktemp(architecture)
        images = {"boi_token": "<image>", "eoi_token": "</image>", "image_token": "<patch>"}
        tokenizer = AutoTokenizer.from_pretrained(SMOKE / "model", extra_special_tokens=images)
        config = copy.deepcopy(PACKED[architecture])
        config.text_config.update({"vocab_size": len(tokenizer), "max_position_embeddings": 1024})
        for part in (config, config.text_config):
            part.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
        torch.manual_seed(seed)
        AutoModelForImageTextToText.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        if architecture == "gemma3":
            Gemma3ImageProcessorPil().save_pretrained(path)
        made[architecture, seed] = path
        return path

    return save


@pytest.fixture
def build(tmp_path, folder):
    """Build the trainer of a run of a tiny model."""

    def build(method, architecture, **overrides):
        # The processor of Qwen needs torchvision, which the tests do without.
        overrides |= {} if architecture == "gemma3" else {"processor_type": "AutoTokenizer"}
        cfg = {"base_model": str(folder(architecture)), "reinit_weights": None, "max_steps": 2, "seed": 7}
        cfg = smoke_config(method, tmp_path, **{**cfg, "dataloader_num_workers": 0, **overrides})
        for section in ("datasets", "test_datasets"):
            cfg[section][0]["split"] = "train[:16]"
        return host_trainer(cfg)

    return build


@pytest.mark.parametrize(
    ("method", "architecture", "settings"),
    [
        ("modpo", "gemma3", {"freeze_mm_modules": True}),
        ("amopo", "gemma3", {**LORA, "lora_target_linear": None, "lora_target_modules": TEXT_LINEARS}),
        ("modpo", "qwen2_5_vl", {**LORA, "lora_target_linear": None, "lora_target_modules": TEXT_LINEARS}),
        ("amopo", "qwen2_5_vl", {}),
    ],
)
def test_two_steps_on_texts_train_the_decoder_alone(build, method, architecture, settings, host_log):
    trainer = build(method, architecture, **settings)
    assert "is trained in packed prefix trees" in host_log.text
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    moved = [name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved
    assert all("language_model" in name or "lm_head" in name for name in moved)


def test_a_margin_of_a_whole_vision_language_model_is_its_log_ratio(build, folder):
    start, other = folder("qwen2_5_vl"), folder("qwen2_5_vl", seed=1)
    margin = {"source": "adapter", "path": str(other), "reference": str(start), "beta": 0.2}
    block = {"objective": "overall", "weights": {"overall": 0.5, "safer": 0.5}, "margins": {"safer": margin}}
    trainer = build("modpo", "qwen2_5_vl", modpo=block)
    kind = AutoModelForImageTextToText
    expected = 0.2 * torch.sub(*(logps(kind.from_pretrained(path), trainer.train_dataset) for path in (other, start)))
    assert expected.abs().max() > 1e-3
    assert torch.allclose(computed(trainer).margins[:6, :, 0], expected, atol=1e-4)


@pytest.mark.parametrize("base", [AMOPO, MODPO], ids=["amopo", "modpo"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "whisper", "is_encoder_decoder": True}, ["'whisper', which is an encoder-decoder"]),
        ({"model_type": "t5", "is_encoder_decoder": True}, ["'t5', which is an encoder-decoder"]),
        ({"model_type": "wav2vec2"}, ["'wav2vec2', which Axolotl cannot load as a language model"]),
        ({"model_type": "qwen2_audio"}, ["'qwen2_audio', which Axolotl cannot load as a language model"]),
        ({"model_type": "siglip"}, ["'siglip', which Axolotl cannot load as a language model"]),
    ],
)
def test_a_base_model_that_is_no_decoder_of_texts_is_refused_by_its_config(base, config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(changed(base, base_model=str(tmp_path)))
    assert message.startswith(f"`base_model`: {tmp_path} is a model of the type ")
    assert "choose a model that continues a text" in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "config",
    [
        *({"model_type": kind} for kind in ("llama", "gpt2", "mamba", "gemma3", "llama4", "qwen2_5_vl", "voxtral")),
        {"model_type": "of-its-own"},
        {"model_type": "wav2vec2", "auto_map": {"AutoModelForCausalLM": "x.Y"}},
        {},
    ],
)
def test_other_base_models_are_left_to_axolotl(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for settings in ({"base_model": str(tmp_path)}, {"base_model": str(tmp_path / "absent")}):
        MOPOPlugin().register(changed(AMOPO, **settings))


def test_a_config_or_a_class_that_the_yaml_names_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    folder = str(tmp_path)
    assert folder in refusal(changed(AMOPO, base_model="x", base_model_config=folder))
    MOPOPlugin().register(changed(AMOPO, base_model=folder, type_of_model="Wav2Vec2ForCTC"))


def test_every_shape_here_is_accepted_as_a_base_model(tmp_path):
    for name, config in {**PACKED, **PADDED}.items():
        config.save_pretrained(tmp_path / name)
        assert isinstance(config, PreTrainedConfig)
        MOPOPlugin().register(changed(AMOPO, base_model=str(tmp_path / name)))


def test_the_key_that_starts_multimodal_training_is_refused_and_a_tokenizer_as_processor_is_not():
    message = refusal(changed(AMOPO, processor_type="AutoProcessor"))
    assert message.startswith("`processor_type: AutoProcessor` starts multimodal training")
    assert "set it to AutoTokenizer" in message
    MOPOPlugin().register(changed(AMOPO, processor_type="AutoTokenizer"))
