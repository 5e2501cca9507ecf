"""Fixtures: tiny real models, the smoke tokenizer, and rows to train on."""

import copy
import gc
import logging
import os
import random
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run in parallel: one core for each test and its commands
    os.environ |= {"OMP_NUM_THREADS": "1"}

import forking  # noqa: F401
import pytest
import torch
import yaml
from accelerate import PartialState
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    TrainerCallback,
)
from warm import AXOLOTL, python

import axolotl_mopo
from axolotl_mopo.logprobs.trees import Pair

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "example_configs" / "smoke"
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
LORA_WITH_DROPOUT = {**LORA, "lora_dropout": 0.1}

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A window of 5 is shorter than every prompt except the shortest.
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=5, attn_logit_softcapping=0.5, final_logit_softcapping=5.0
    ),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=5),
    "phi3": Phi3Config(**SHAPE, sliding_window=5),
    "olmo": OlmoConfig(**SHAPE),
    "olmo2": Olmo2Config(**SHAPE),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


MIXTURES = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def build_model(config, attention="sdpa", dtype=torch.float32):
    """A model with random weights, large enough that attention matters, and no dropout."""
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if config.sub_configs else AutoModelForCausalLM
    model = kind.from_config(copy.deepcopy(config), attn_implementation=attention).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.25)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def stir(model, spread=0.3):
    """Change a model's LoRA adapters, since initial ones have no effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, spread)
    return model


def save_adapter(base, folder, seed, spread=0.3):
    """Save a LoRA adapter that changes the base model."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    stir(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), spread).save_pretrained(folder)
    return folder


def save_reward_model(folder, tokenizer, labels):
    """Save and return a tiny reward model with one head per label."""
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = dict(enumerate(labels))
    ids = {label: index for index, label in names.items()}
    config = LlamaConfig(**shape, vocab_size=len(tokenizer), id2label=names, label2id=ids)
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def ragged_pairs(dimensions=2):
    """Pairs of very different lengths, including one-token completions."""
    rng = random.Random(0)

    def tokens(count):
        return [rng.randrange(3, 97) for _ in range(count)]

    shapes = [([7, 12, 3, 9], 9, 1), ([20, 1, 6, 4], 2, 14), ([5, 5, 5, 5], 1, 1)]
    return [Pair([tokens(n) for n in prompts[:dimensions]], tokens(c), tokens(r)) for prompts, c, r in shapes]


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that other workers do not wait for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish():
    """Exclude imported modules from garbage collection, which Axolotl runs explicitly in every training run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def accelerate_state():
    """Restore accelerate's state after a test that emptied it, since Axolotl expects it to persist."""
    yield
    if not PartialState._shared_state:
        PartialState()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of prepared rows that the tests of a module share."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOKE / "model")


@pytest.fixture
def host_log(caplog, monkeypatch):
    """Captures Axolotl's loggers, including this package's. Importing Axolotl's command line configures them."""
    import axolotl.cli  # noqa: F401

    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # a command in this process may have set it
    caplog.set_level(logging.INFO, "axolotl")
    return caplog


def smoke_config(method, output_dir, **overrides):
    """The smoke YAML of a method with absolute paths and replaced top-level keys (None removes a key)."""
    cfg = yaml.safe_load((ROOT / "example_configs" / f"smoke-{method}.yaml").read_text())
    cfg["base_model"] = str(SMOKE / "model")
    for section in ("datasets", "test_datasets"):
        cfg[section][0]["path"] = str(ROOT / cfg[section][0]["path"])
    cfg |= {"output_dir": str(output_dir / "out"), "dataset_prepared_path": str(output_dir / "prepared")}
    cfg |= {"logging_steps": 1, "save_strategy": "no", "dataset_num_proc": 0, **overrides}
    for key in ("evals_per_epoch", "saves_per_epoch"):
        cfg.pop(key)
    return {key: value for key, value in cfg.items() if value is not None}


def twenty_steps(method, output_dir, processes, **overrides):
    """A run with a global batch of four and a number of rows that two processes cannot share evenly."""
    steps = {"max_steps": 20, "learning_rate": 0.0005, "gradient_accumulation_steps": 1}
    steps |= {"eval_strategy": "steps", "eval_steps": 20, "dataloader_num_workers": 0, "seed": 7}
    steps |= {"micro_batch_size": 4 // processes, "eval_batch_size": 4 // processes}
    cfg = smoke_config(method, output_dir, **{**steps, **overrides})
    cfg["datasets"][0]["split"], cfg["test_datasets"][0]["split"] = "train[:101]", "train[:21]"
    return cfg


class Poison(TrainerCallback):
    """Makes a token's embedding infinite before the first step."""

    def __init__(self, token):
        self.token = token

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.get_input_embeddings().weight[self.token] = torch.inf


def rare_token(trainer):
    """A token that occurs in one row only, and the number of that row."""
    rows = [
        {*chain(*row["prompt_input_ids"], row["chosen_input_ids"], row["rejected_input_ids"])}
        for row in trainer.train_dataset
    ]
    counts = Counter(token for row in rows for token in row)
    return next((token, number) for number, row in enumerate(rows) for token in sorted(row) if counts[token] == 1)


def host_trainer(cfg):
    """The trainer that Axolotl builds from a configuration with its own config, data, model and builder code."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    validated = load_cfg(DictDefault(copy.deepcopy(cfg)))
    data = load_preference_datasets(cfg=validated, cli_args=TrainerCliArgs())
    return setup_model_and_trainer(validated, data)[0]


def axolotl(*arguments, cwd=ROOT, fails=False):
    """Run the real `axolotl` command in a fork of the warm process, and return its output."""
    done = python(AXOLOTL, *arguments, cwd=cwd)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) is fails, output[-5000:]
    return output


def prepare(rows, tokenizer, *, method="amopo", kind="pairs", entry=None, num_proc=0, **settings):
    """The rows after Axolotl's own map. `settings` go to the YAML if it has the key, else to the method's block."""
    blocks = {
        "amopo": {"dimensions": ["helpfulness"], "score_range": [0, 4]},
        "modpo": {"objective": "better", "weights": {"better": 1}},
    }
    top = {key: settings.pop(key) for key in ("sequence_len", "excess_length_strategy", "seed") if key in settings}
    from axolotl.utils.data.rl import _map_dataset
    from axolotl.utils.data.shared import load_dataset_with_config

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.parquet"
        Dataset.from_list(rows).to_parquet(path)
        tokenizer.save_pretrained(folder)
        cfg = DictDefault(
            {
                "rl": method,
                method: {**blocks[method], **settings},
                "sequence_len": 512,
                "base_model_config": str(SMOKE / "model"),
                "tokenizer_config": folder,
                "dataset_num_proc": num_proc,
                "dataset_prepared_path": f"{folder}/prepared",
                "datasets": [{"path": path, "type": f"axolotl_mopo.{kind}", **(entry or {})}],
                **top,
            }
        )
        axolotl_mopo.MOPOPlugin().register(cfg)
        strategy = getattr(axolotl_mopo, cfg["datasets"][0]["type"].removeprefix("axolotl_mopo."))
        transform, arguments = strategy(cfg, dataset_idx=0)
        table = load_dataset_with_config(cfg["datasets"][0], False)
        arguments["remove_columns"] = table.column_names
        prepared = _map_dataset(cfg, table, transform, tokenizer, **arguments)
        return prepared.to_list()
