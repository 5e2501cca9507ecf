"""Models and tokenizers of strangers: broken or hostile files are refused with what is wrong, and run nothing."""

import copy
import json
import os
import pickle
import time

import pytest
import torch
from conftest import CONFIGS, SMOKE, build_model, save_reward_model
from peft import LoraConfig, get_peft_model
from test_data import ROW, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_mopo.config.model_files import AdapterConfig
from axolotl_mopo.data import chat_templates
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.rows import NO_INPUTS, RatedResponse
from axolotl_mopo.errors import ConfigError, DataError, RowError
from axolotl_mopo.records import read_record
from axolotl_mopo.rewards import AdapterSource, FunctionSource, RewardModelSource
from axolotl_mopo.rewards.adapter_twin import with_adapter
from axolotl_mopo.rewards.function import import_function
from axolotl_mopo.rewards.loading import load_whole
from axolotl_mopo.rewards.resolve import resolve_source

QUESTION = [{"role": "user", "content": "Why?"}]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOKE / "model")


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0] + 1 }}",
        "{{ 1 / 0 }}",
        "{{ 10 ** 10000 }}",
        "{{ messages | no_such_filter }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ range(10 ** 9) }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_that_cannot_be_rendered_is_named(tokenizer, template):
    with pytest.raises(DataError, match=r"the chat template refuses a conversation of the roles user, assistant: .+"):
        ChatRenderer(with_template(tokenizer, template))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'x' * 3000000000 }}", "it takes more than 1,024 MiB"),
        ("{{ '{:>3000000000}'.format(1) }}", "it takes more than 1,024 MiB"),
        ("{{ 'x' * 2000000 }}", "it writes more than 1,000,000 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x", "it takes more than 1 sec"),
    ],
)
def test_a_chat_template_that_takes_the_machine_is_tried_in_a_process_of_its_own(
    tokenizer, template, words, monkeypatch
):
    monkeypatch.setattr(chat_templates, "_CPU_SECONDS", 1)
    hostile = with_template(tokenizer, template)
    with pytest.raises(DataError, match=words):
        ChatRenderer(hostile)
    started = time.monotonic()
    with pytest.raises(DataError, match=words):  # what was found is remembered
        ChatRenderer(hostile)
    assert time.monotonic() - started < 0.5


def test_a_chat_template_is_tried_as_it_is_asked_for_a_prompt_too(tokenizer):
    loops = "{% for i in range(2500) %}" * 3 + "{{ i }}" + "{% endfor %}" * 3
    bomb = with_template(tokenizer, tokenizer.chat_template + "{% if add_generation_prompt %}" + loops + "{% endif %}")
    with pytest.raises(RowError, match=r"it takes more than|it writes more than|the process that rendered it"):
        ChatRenderer(bomb).prompt(QUESTION)


def test_a_chat_template_that_leaves_a_turn_out_is_refused(tokenizer):
    own = "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}{% endfor %}"
    renderer = ChatRenderer(with_template(tokenizer, own))
    answers = [RatedResponse("Yes.", {})]
    renderer.check(QUESTION, answers, NO_INPUTS)
    with pytest.raises(RowError, match="leaves out the content of a turn of role system"):
        renderer.check([{"role": "system", "content": "Be brief."}, *QUESTION], answers, NO_INPUTS)


def test_a_chat_template_is_tried_once_and_leaves_no_process(tokenizer, monkeypatch):
    forks, fork = [], os.fork

    def counted():
        forks.append(fork())
        return forks[-1]

    monkeypatch.setattr(os, "fork", counted)
    own = with_template(tokenizer, tokenizer.chat_template + "{# another #}")
    for _ in range(3):
        assert ChatRenderer(own).prompt(QUESTION) == ChatRenderer(tokenizer).prompt(QUESTION)
    assert len(forks) <= 4
    for child in forks:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_a_chat_template_is_rendered_where_no_process_can_be_made(tokenizer, monkeypatch):
    def refused():
        raise OSError("no more processes")

    monkeypatch.setattr(os, "fork", refused)
    own = with_template(tokenizer, tokenizer.chat_template + "{# a third #}")
    assert ChatRenderer(own).prompt(QUESTION) == ChatRenderer(tokenizer).prompt(QUESTION)


def test_a_score_that_breaks_a_directive_is_told_with_data_set_and_row(tokenizer):
    directives = {"dimension": "{{ 1 / (score - 2.13) }}"}
    row = {**ROW, "chosen_scores": {"helpfulness": 2.13}, "rejected_scores": {"helpfulness": 1}}
    with pytest.raises(DataError, match=r"datasets\[0\].*, row 1: .*for helpfulness at the score 2.13: float division"):
        prepare([{**row, "chosen_scores": {"helpfulness": 4}}, row], tokenizer, directives=directives)


def test_a_reward_models_chat_template_is_named_with_the_row(tokenizer, tmp_path):
    save_reward_model(tmp_path, with_template(tokenizer, "{{ 1 / 0 }}"), ["a"])
    margin = RewardModelSource(source="reward_model", path=str(tmp_path), dtype="float32")
    with margin.opened(torch.device("cpu")) as rewards, pytest.raises(DataError) as caught:
        rewards([QUESTION], ["Because."], [7])
    assert str(caught.value).startswith(f"{tmp_path}, row 7: the chat template refuses")


class Code:
    """Unpickled, it runs something."""

    def __reduce__(self):
        return print, ("ran",)


@pytest.fixture
def whole(tmp_path):
    """The folder of a whole model."""
    build_model(copy.deepcopy(CONFIGS["qwen2"])).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def adapter(whole, tmp_path):
    """The folder of an adapter of it."""
    base = AutoModelForCausalLM.from_pretrained(whole)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def hostile(folder, name, kind):
    """Put a hostile or a broken file in the place of weights."""
    next(folder.glob("*.safetensors")).unlink()
    if kind == "safetensors":
        (folder / f"{name}.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      x")
    elif kind == "pickle":
        with (folder / ("pytorch_model.bin" if name == "model" else f"{name}.bin")).open("wb") as file:
            pickle.dump({"weight": Code()}, file)
    else:
        torch.save({"weight": Code()}, folder / ("pytorch_model.bin" if name == "model" else f"{name}.bin"))


KINDS = {
    "pickle": "cannot be opened safely.*saved as safetensors",
    "torch": "cannot be opened safely.*saved as safetensors",
    "safetensors": "a safetensors file is broken",
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_cannot_be_opened_safely_are_refused(whole, kind, capsys):
    hostile(whole, "model", kind)
    with pytest.raises(ConfigError, match=f"the weights of {whole} .*{KINDS[kind]}") as caught:
        load_whole(AutoModelForCausalLM, str(whole), torch.float32)
    assert "weights_only" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_cannot_be_opened_safely_is_refused(whole, adapter, kind, capsys):
    hostile(adapter, "adapter_model", kind)
    model = AutoModelForCausalLM.from_pretrained(whole)
    with (
        pytest.raises(ConfigError, match=f"the weights of {adapter} .*{KINDS[kind]}"),
        with_adapter(model, str(adapter)),
    ):
        pass
    assert "ran" not in capsys.readouterr().out


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    return write


def test_a_function_that_ends_the_program_is_an_error(module):
    module("ends_at_import", "import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"the function ends_at_import:f cannot be imported: SystemExit\(0\)"):
        import_function("ends_at_import:f")
    module("ends_when_called", "import sys\ndef f(prompts, responses):\n    sys.exit()\n")
    source = FunctionSource(source="callable", function="ends_when_called:f")
    with (
        source.opened(None) as rewards,
        pytest.raises(DataError, match=r"ends_when_called:f, .* the first from row 3, raised SystemExit\(0?\)"),
    ):
        rewards([QUESTION], ["x"], [3])


@pytest.mark.parametrize("where", ["at import", "when called"])
def test_an_interrupt_of_the_user_passes(module, where):
    name = f"interrupted_{where.replace(' ', '_')}"
    body = "raise KeyboardInterrupt\n"
    module(name, body if where == "at import" else f"def f(prompts, responses):\n    {body}")
    source = FunctionSource(source="callable", function=f"{name}:f")
    with pytest.raises(KeyboardInterrupt), source.opened(None) as rewards:
        rewards([QUESTION], ["x"], [3])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", "[]", "adapter_config.json: input should be"),
        ("adapter_config.json", '{"init_lora_weights": {"a": 1}}', "adapter_config.json, `init_lora_weights"),
        ("adapter_config.json", '{"base_model_name_or_path": 3}', "`base_model_name_or_path`: input should be a valid"),
        ("adapter_config.json", '{"peft_type": ["LORA"]}', "`peft_type`: input should be a valid string"),
        ("adapter_config.json", None, "adapter_config.json is not a regular file"),
        ("mopo.json", '{"method": ["modpo"]}', "mopo.json, `method`: input should be a valid string"),
        ("mopo.json", '{"method": "modpo", "beta": -0.1}', "mopo.json, `beta`: input should be greater than 0"),
        ("mopo.json", '{"method": "modpo", "beta": 0}', "mopo.json, `beta`: input should be greater than 0"),
        ("mopo.json", '{"method": "modpo", "beta": true}', "mopo.json, `beta`: input should be a valid number"),
        ("mopo.json", '{"method": "modpo", "beta": NaN}', "mopo.json, `beta`: input should be a finite number"),
        ("mopo.json", "[1]", "mopo.json: input should be"),
        ("mopo.json", None, "mopo.json is not a regular file"),
    ],
)
def test_records_of_a_margins_adapter_that_are_wrong_are_named(tmp_path, file, content, words):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "mopo.json").write_text('{"method": "modpo", "beta": 0.1}')
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file) if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=r"`modpo\.margins\.a\.path` cannot be read: ") as caught:
        resolve_source(AdapterSource(source="adapter", path=str(tmp_path)), "`modpo.margins.a")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"architectures": "X"}', "`architectures`: input should be a valid array"),
        ('{"id2label": ["a"]}', "`id2label`: input should be"),
        ('{"id2label": {"first": "a"}}', "`id2label`: 'first' is not an index"),
    ],
)
def test_a_reward_models_record_that_is_wrong_is_named(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"`modpo\.margins\.a\.path`.*config\.json") as caught:
        resolve_source(RewardModelSource(source="reward_model", path=str(tmp_path)), "`modpo.margins.a")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}, "use_dora": True},
    ],
)
def test_what_peft_writes_is_read(tmp_path, settings):
    config = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="who/ever", **settings)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    read = read_record(AdapterConfig, tmp_path / "adapter_config.json")
    assert read.model_dump() == {key: written[key] for key in AdapterConfig.model_fields}
