"""Arbitrary comparison folders: compared as they are, or refused with the file's name, and never anything else."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_front import comparison
from test_fuzz import mutated, nested

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.page import render
from axolotl_mopo.evaluation.policies import find_policies
from axolotl_mopo.evaluation.report import notes, table, to_csv, to_json
from axolotl_mopo.evaluation.schema import PromptChoice
from axolotl_mopo.evaluation.statistics import find_front

WORDS = [
    *(
        "a",
        "b",
        "A",
        "reference",
        "policy",
        "baseline",
        "kind",
        "path",
        "base",
        "manifest",
        "method",
        "weights",
        "modpo",
    ),
    *(
        "helpful",
        "cost",
        "kl",
        "tokens",
        "helpful_low",
        "logp",
        "ref_logp",
        "finished",
        "prompt_id",
        "sample",
        "prompt",
    ),
    *("reasoning", "reasoning_tokens", "reasoning_content", "tools", "tool_calls", "chat_template_kwargs"),
    *("role", "content", "user", "count", "digest", "samples", "temperature", "model", "neutral", "lower_is_better"),
    *("../x", "/x", "$(x)", "=1", "\ud800", "\x1b[31m", "", "é" * 60, "x" * 101, "a\n"),
]
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
NUMBERS = st.one_of(
    st.integers(-2, 5),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, 1e30, -1e30, 1.7e308, math.nan, math.inf, -math.inf]),
)
VALUES = nested(st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS), TEXTS)
REWARDS = {
    "a": [[(4, 2), (2, 0)], [(3, 1), (3, 1)]],
    "b": [[(2, 0), (2, 0)], [(2, 0), (1, 0)]],
    "reference": [[(3, 1), (1, 1)], [(2, 1), (2, 1)]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return comparison(tmp_path_factory.mktemp("fuzzed"), REWARDS).folder


def compared(folder, changed):
    """Compare what is in a folder with one file changed, and put that back."""
    path = folder / changed[0]
    before = path.read_bytes()
    path.write_bytes(changed[1])
    try:
        with Comparison.existing(folder) as opened:
            front = find_front(opened)
            table(front)
            notes(front)
            to_csv(front).encode()
            assert json.loads(to_json(front), parse_constant=pytest.fail)["policies"]
            render(front, opened, 2).encode()
    except ConfigError as error:
        assert str(folder) in str(error) or "axolotl mopo" in str(error)
        assert "\x1b" not in str(error)
    finally:
        path.write_bytes(before)


def dumped(value):
    return json.dumps(value).encode()


@given(data=st.data())
def test_changed_settings_are_compared_or_refused(folder, data):
    valid = json.loads((folder / "comparison.json").read_text())
    compared(folder, ("comparison.json", dumped(data.draw(mutated([valid], VALUES, TEXTS)))))


@given(value=VALUES)
def test_arbitrary_settings_are_refused(folder, value):
    compared(folder, ("comparison.json", dumped(value)))


@given(data=st.data())
def test_changed_responses_are_compared_or_refused(folder, data):
    rows = [json.loads(line) for line in (folder / "responses" / "a.jsonl").read_text().splitlines()]
    changed = data.draw(mutated([rows], VALUES, TEXTS))
    compared(folder, ("responses/a.jsonl", b"".join(dumped(row) + b"\n" for row in changed)))


@given(content=st.binary(max_size=60), name=st.sampled_from(["comparison.json", "responses/b.jsonl"]))
def test_arbitrary_bytes_are_refused(folder, content, name):
    compared(folder, (name, content))


MANIFESTS = [
    {
        **{"method": "modpo", "base_model": "x", "weights": {"a": 0.5, "b": 0.5}, "beta": 0.1},
        **{"versions": {"torch": "2"}, "chat_template_kwargs": {"enable_thinking": False}},
    },
    {
        "method": "amopo",
        "base_model": "x",
        "dimensions": ["helpfulness", "kindness"],
        "integrated": True,
        "score_range": [1, 5],
        "directives": {"dimension": "{{ dimension }} {{ score }}", "integrated": "{{ dimensions | join(', ') }}"},
        "directive_position": "after",
    },
]
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/model",
    "r": 8,
    "lora_alpha": 16,
    "init_lora_weights": True,
    "target_modules": ["q_proj"],
}
TEMPLATES = st.sampled_from(
    ["{{ 1 / (score - 2) }}", "{{ '{:>3000000000}'.format(1) }}", "{% for", "\ud800", "{{ x }}"]
)
OF_MODELS = nested(st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, TEMPLATES), TEXTS)


@given(
    manifest=st.one_of(mutated(MANIFESTS, OF_MODELS, TEXTS), OF_MODELS),
    adapter=st.one_of(st.just(ADAPTER), mutated([ADAPTER], OF_MODELS, TEXTS), OF_MODELS),
)
def test_what_stands_beside_a_model_is_taken_as_it_is_or_refused(tmp_path_factory, manifest, adapter):
    folder = tmp_path_factory.getbasetemp() / "a-model"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").touch()
    (folder / "mopo.json").write_bytes(dumped(manifest))
    (folder / "adapter_config.json").write_bytes(dumped(adapter))
    try:
        (policy,) = find_policies([str(folder)])
        assert policy.base == adapter["base_model_name_or_path"]
        assert policy.label.isprintable()
        (turn,) = policy.asked([{"role": "user", "content": "Why?"}], PromptChoice())
        assert turn["content"].encode()
    except ConfigError as error:
        assert str(folder) in str(error) or "--dimension" in str(error)
        assert "\x1b" not in str(error)
    else:
        assert policy.manifest.method == manifest["method"]
