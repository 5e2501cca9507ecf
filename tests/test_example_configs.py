"""Every example config passes Axolotl's validation without changes."""

import copy

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT

EXAMPLES = ROOT / "example_configs"
CONFIGS = {
    str(path.relative_to(EXAMPLES).with_suffix("")): path
    for path in sorted(EXAMPLES.rglob("*.yaml"))
    if "sweep" not in path.name
}
ON_GPUS = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


def test_there_are_smoke_configs_recipes_the_papers_experiments_and_the_gallery():
    assert list(CONFIGS) == [
        "gallery/safety-dpo",
        "gallery/safety-modpo",
        "gallery/safety-sft",
        "qwen2.5-7b-amopo-zero3",
        "qwen2.5-7b-modpo-lora",
        "safety-dpo",
        "safety-modpo",
        "smoke-amopo",
        "smoke-modpo",
        "summaries-modpo",
        "summaries-sft",
    ]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A clone with the outputs of the experiments' first steps."""
    (tmp_path / "example_configs").symlink_to(EXAMPLES)
    for folder in (tmp_path / "outputs" / "safety-dpo", tmp_path / "outputs" / "gallery" / "safety" / "dpo"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_an_example_passes_the_hosts_validation(path, checkout):
    cfg = DictDefault(yaml.safe_load(path.read_text()))
    method = cfg.rl
    prepare_plugins(cfg)
    validated = validate_config(cfg, capabilities=ON_GPUS, env_capabilities={"torch_version": "2.13.0"})
    if cfg.plugins:
        assert validated[method]
        assert validated.trainer_cls.lower() == f"axolotl_mopo.training.{method}.{method}trainer"
    unknown = set(yaml.safe_load(path.read_text())) - set(validated)
    assert not unknown, f"the host dropped {unknown}"


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("safety-modpo", "<s>BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:"),
        ("safety-dpo", "BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:"),
        ("summaries-modpo", "<s>\n\nParagraph:\nWhy?\n\nTL;DR:\n"),
        ("summaries-sft", "<s>\n\nParagraph:\nWhy?\n\nTL;DR:\n"),
    ],
)
def test_the_experiments_prompts_are_the_authors(name, prompt, tokenizer):
    template = yaml.safe_load(CONFIGS[name].read_text())["chat_template_jinja"]
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(special)
    for turns, add, expected in ((messages[:1], True, prompt), (messages, False, f"{prompt}So.</s>")):
        rendered = tokenizer.apply_chat_template(
            turns, add_generation_prompt=add, tokenize=False, chat_template=template
        )
        assert rendered == expected
