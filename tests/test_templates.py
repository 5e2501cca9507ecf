"""Templates of directives: what they may say, where they may come from, and what they can never take."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
from axolotl.cli.config import load_cfg
from axolotl.utils.dict import DictDefault
from bombs import BOMBS
from conftest import ROOT, smoke_config
from pydantic import ValidationError
from test_config import AMOPO, changed, refusal

from axolotl_mopo.config import AMoPOConfig, Directives, MOPOArgs, parse_settings, sandbox
from axolotl_mopo.config.model_files import Manifest
from axolotl_mopo.config.templates import dimension_values
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.plugin import MOPOPlugin
from axolotl_mopo.records import read_record

VALUES = dimension_values("honest_y", 3.333, ["honest_y", "wit"], (1, 5))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ dimension }} {{ score }} of {{ low }} to {{ high }}", "honest y 3.33 of 1 to 5"),
        ("{{ dimensions }} {{ dimensions | join(' & ') }}", "['honest y', 'wit'] honest y & wit"),
        ("{% for d in dimensions if d != dimension %}{{ loop.index }}{{ d | upper ~ '!' }}{% endfor %}", "1WIT!"),
        ("{% for d in dimensions %}{{ d }}{{ ', ' if not loop.last }}{% endfor %}", "honest y, wit"),
        ("{% for a, b in ['xy', 'zw'] %}{{ b }}{{ a }}{% endfor %}", "yxwz"),
        ("{% for a in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for d in dimensions %}{{ loop.cycle('a', 'b') }}{{ loop.revindex0 }}{% endfor %}", "a1b0"),
        ("{{ {1: 'poor', 3.33: 'fair'}[score] }}{{ dimensions[0][:3] }}{{ dimensions | last }}", "fairhonwit"),
        ("{{ dimensions | reject('eq', dimension) | map('title') | first }}", "Wit"),
        (
            "{{ dimensions | select('in', ['wit']) | list | count }}{{ 'b,a,A' | replace(',', '') | sort }}",
            "1['a', 'A', 'b']",
        ),
        ("{{ (score / high * 100) | round | int }}% {{ -score | abs }} {{ 7 // 2 }} {{ 7 % 4 }}", "67% 3.33 3 3"),
        ("{{ [3, 1, 2] | min }}{{ [3, 1, 2] | max }}{{ [3, 1] | sum }}{{ ['a', 'A', 'b'] | unique | length }}", "1342"),
        ("{{ nothing_here | default('x') }}{{ '' | d('y', true) }}{{ nothing_here is defined }}", None),
        ("{% if score is number and score > 3 %}high{% elif score == 3 %}mid{% else %}low{% endif %}", "high"),
        ("{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 'abc' | reverse }}{{ ' x ' | trim }}{{ 'ß' | upper }}", "ab[1, 2]cbaxSS"),
        (
            "{{ range(3) | join }}{{ '4' | int + 1 }}{{ '0.5' | float }}{{ 3 | string ~ 4 }}{{ 'aB' | capitalize }}",
            "01250.534Ab",
        ),
        ("{# a comment #}{% raw %}{{ x }}{% endraw %}", "{{ x }}"),
    ],
)
def test_a_template_says_what_jinja_makes_of_it(template, text):
    if text is None:  # the names of variables are checked before, so this is what is left of `default`
        assert sandbox.variables(template) == {"nothing_here"}
        assert sandbox.render(template, {}) == "xyFalse"
        return
    assert sandbox.variables(template) <= set(VALUES)
    assert sandbox.render(template, VALUES) == text


@pytest.mark.parametrize("way", ["yaml", "model"])
def test_no_template_takes_a_second_or_a_hundred_mib(way, tmp_path):
    program = [sys.executable, ROOT / "tests" / "bombs.py", way]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for template, (message, seconds, grown) in zip(BOMBS, json.loads(done.stdout), strict=True):
        assert "integrated" in str(message), template[:60]
        assert "Memory" not in message
        assert seconds < 1
        assert grown < 100


@pytest.mark.parametrize(
    "template",
    [
        "{{ loop.index }}",
        "{% for d in dimensions %}{{ loop.__class__ }}{% endfor %}",
        "{% for d in dimensions %}{{ loop }}{% endfor %}",
        "{{ range }}",
        "{{ dimensions | map('is looped over', 3) }}",
        "{{ dimensions | map(attribute='x') }}",
        "{{ dimensions | join(*['x']) }}",
        "{{ range(**{'stop': 3}) }}",
        "{{ 'x' | attr('format') }}",
        "{{ 'x'['format'] }}",
        "{{ dimensions is callable }}",
        "{% for range in ['x'] %}{{ range() }}{% endfor %}",
        "{{ [dimensions] }}",
        "{% for dimensions.x in 'ab' %}{% endfor %}x",
        "{% filter upper %}x{% endfilter %}",
        "{% autoescape true %}x{% endautoescape %}",
        "{{ 1e999 }}",
        "{{ dimensions < 3 }}",
    ],
)
def test_what_is_not_known_of_jinja_is_refused(template):
    assert "`amopo.directives.integrated`" in refusal(changed(AMOPO, amopo__directives={"integrated": template}))


def test_a_template_is_compiled_once():
    sandbox._compiled.cache_clear()
    for score in (1, 2, 3):
        sandbox.render("{{ score }}", {"score": score})
    assert sandbox._compiled.cache_info().misses == 1


def test_a_rendering_ends_by_the_clock_where_steps_are_slow(monkeypatch):
    monkeypatch.setattr(sandbox, "_SECONDS", -1)
    with pytest.raises(ValueError, match="it takes too long"):
        sandbox.render("{{ 1 }}", {})


def test_a_rendering_ends_by_its_steps_on_a_fast_machine_too(monkeypatch):
    monkeypatch.setattr(sandbox, "_SECONDS", 1e9)
    loop = "{% for i in range(999) %}"
    with pytest.raises(ValueError, match="it takes too long"):
        sandbox.render(f"{loop}{loop}{{% endfor %}}{{% endfor %}}x", {})


@pytest.mark.parametrize(
    "template",
    [
        *(
            "{{ a ~ a }}",
            "{{ a + a }}",
            "{{ [a, a] }}",
            "{{ {a: a} }}",
            "{{ [a] + [a] }}",
            "{{ a | replace('x', 'xx') }}",
        ),
        *("{{ 'xxx' | list | join(a) }}", "{% for b in [a, a] %}{% endfor %}x", "{{ 1 in [a, a] }}"),
    ],
)
def test_no_value_is_longer_than_ten_thousand_characters(template):
    assert sandbox.render("{{ a }}", {"a": "x" * 6000}) == "x" * 6000
    with pytest.raises(ValueError, match=r"1[28],.* characters of one value are more than the limit of 10,000"):
        sandbox.render(template, {"a": "x" * 6000})


@pytest.mark.parametrize(
    ("range_", "template", "score"),
    [
        ([1, 5], "{{ 1 / (score - 1) }}", "1"),
        ([1, 5], "{{ 1 / (score - 2) }}", "2"),
        ([1, 5], "{{ 1 / (score - 4.5) }}", "4.5"),
        ([0, 0.5], "{{ 1 / (score - 0.25) }}", "0.25"),
        ([-100, 900], "{{ 1 / (score - 400) }}", "400"),
        ([1, 5], "{% if score != 3 %}x{% endif %}", "3"),
    ],
)
def test_a_template_is_tried_with_scores_all_over_the_range(range_, template, score):
    message = refusal(changed(AMOPO, amopo__directives={"dimension": template}, amopo__score_range=range_))
    assert "`directives.dimension` does not work with these dimensions and this range: it " in message
    assert f" for helpfulness at the score {score}" in message


def test_a_template_is_tried_with_every_dimension():
    template = "{{ 1 / (dimension | replace('correctness', '') | length) }}"
    message = refusal(changed(AMOPO, amopo__directives={"dimension": template}))
    assert "it cannot be rendered for correctness at the score 1: division by zero" in message


def test_a_model_that_cannot_be_asked_at_a_score_says_so():
    block = AMoPOConfig(
        dimensions=["wit"], directives=Directives(dimension="{{ 1 / (score - 1.13) }}"), integrated=False
    )
    with pytest.raises(ValueError, match=r"cannot be rendered for wit at the score 1.13: float division by zero"):
        block.inference_directive("wit", 1.13)


def test_a_model_is_asked_at_any_score_of_its_range():
    template = Directives(dimension="{{ dimension }} {{ score }}", integrated="{{ dimensions | join }}")
    block = AMoPOConfig(dimensions=["wit", "tact"], score_range=(2, 7), directives=template)
    for score, said in ((2, "2"), (4.5, "4.5"), (7, "7"), (None, "7")):
        assert block.inference_directive("tact", score).around("Q") == f"tact {said}\n\nQ"
    for score in (1.99, 7.01):
        with pytest.raises(ValueError, match=f"the score {score} is outside `score_range`; choose one from 2 to 7"):
            block.inference_directive("tact", score)
    assert block.inference_directive().around("Q") == "wittact\n\nQ"
    with pytest.raises(
        ValueError, match="a score needs a dimension, since the integrated prompt has none; name a dimension"
    ):
        block.inference_directive(score=3)
    alone = block.model_copy(update={"integrated": False, "directive_position": "after"})
    with pytest.raises(ValueError, match="so there is no integrated prompt; choose one of the dimensions wit, tact"):
        alone.inference_directive()
    assert alone.inference_directive("wit", 3).around("Q") == "Q\n\nwit 3"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"dimensions": ["a\ud800"]}, "surrogate"),
        ({"directives": {"integrated": "a\ud800"}}, "surrogate"),
        ({"directives": {"integrated": "{{ 'a\\ud800' }}"}}, "surrogate"),
        ({"dimensions": ["a" * 201]}, "has 201 characters"),
        ({"score_range": [0, 0.004]}, "are the same number with two decimals"),
        ({"score_range": [0, 2e6]}, "goes beyond 1e+06"),
        ({"score_range": [-1e308, 1e308]}, "goes beyond 1e+06"),
    ],
)
def test_names_texts_and_ranges_that_no_prompt_can_hold_are_refused(setting, words):
    message = refusal(changed(AMOPO, amopo=AMOPO["amopo"] | setting))
    assert words in message or (words == "surrogate" and "unicode" in message)


def test_narrow_ranges_that_a_prompt_can_name_are_taken():
    assert AMoPOConfig(dimensions=["a"], score_range=(0.99, 1)).score_range == (0.99, 1)


@pytest.fixture
def folder(tmp_path):
    """A folder with a YAML and templates, and a secret beside it."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.jinja").write_text("secret")
    yaml = tmp_path / "yaml"
    (yaml / "in").mkdir(parents=True)
    (yaml / "in" / "x.jinja").write_text("Mind {{ dimension }}.\n")
    (yaml / "y.jinja").symlink_to("in/x.jinja")
    (yaml / "out.jinja").symlink_to(tmp_path / "secret.jinja")
    (yaml / "text.jinja").symlink_to(tmp_path / "secret.txt")
    (yaml / "notes.txt").write_text("notes")
    (yaml / "named.jinja").symlink_to("notes.txt")
    (yaml / "long.jinja").write_text("x" * 50_000)
    (yaml / "bytes.jinja").write_bytes(b"\xff")
    (yaml / "folder.jinja").mkdir()
    os.mkfifo(yaml / "pipe.jinja")
    return yaml


def with_file(folder, name):
    """A configuration of a YAML in the folder that names a file of it."""
    cfg = changed(AMOPO, amopo__directives={"dimension": {"file": str(folder / name)}})
    return cfg | {"axolotl_config_path": str(folder / "config.yaml")}


@pytest.mark.parametrize("name", ["in/x.jinja", "y.jinja", "../yaml/y.jinja"])
def test_the_text_of_a_file_in_the_folder_of_the_yaml_takes_its_place(folder, name):
    cfg = with_file(folder, name)
    MOPOPlugin().register(cfg)
    assert cfg["amopo"]["directives"] == {"dimension": "Mind {{ dimension }}."}
    assert MOPOArgs(amopo=cfg["amopo"]).amopo.directives.dimension == "Mind {{ dimension }}."
    before = json.dumps(cfg)
    MOPOPlugin().register(cfg)  # as another process of the run does, which may not have the file
    assert json.dumps(cfg) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.jinja", "is outside"),
        ("../secret.jinja", "is outside"),
        ("text.jinja", "a link to secret.txt, is not a template"),
        ("named.jinja", "a link to notes.txt, is not a template"),
        ("pipe.jinja", "is not a regular file"),
        ("folder.jinja", "cannot be read"),
        ("long.jinja", "the limit is 40,000"),
        ("bytes.jinja", "cannot be read"),
        ("none.jinja", "cannot be read"),
    ],
)
def test_no_other_file_comes_into_prompts(folder, name, words):
    with pytest.raises(ConfigError, match=r"`amopo\.directives\.dimension`") as caught:
        MOPOPlugin().register(with_file(folder, name))
    assert words in str(caught.value)
    assert "secret" not in str(caught.value).replace("secret.txt", "").replace("secret.jinja", "")


def test_a_yaml_that_axolotl_wrote_itself_names_files_below_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    cfg = smoke_config(
        "amopo", folder, amopo={"dimensions": ["helpfulness"], "directives": {"dimension": {"file": "y.jinja"}}}
    )
    assert load_cfg(DictDefault(cfg)).amopo.directives.dimension == "Mind {{ dimension }}."
    monkeypatch.chdir(folder / "in")
    cfg["amopo"]["directives"]["dimension"] = {"file": "../y.jinja"}
    MOPOPlugin().register(cfg | {"axolotl_config_path": f"{tempfile.gettempdir()}/tmp1.yaml"})
    cfg["amopo"]["directives"]["dimension"] = {"file": "../long.jinja"}
    with pytest.raises(ConfigError, match="is outside"):
        MOPOPlugin().register(cfg | {"axolotl_config_path": f"{tempfile.gettempdir()}/tmp1.yaml"})


def test_a_saved_model_names_no_file(folder):
    path = folder / "mopo.json"
    named = {"file": str(folder / "in" / "x.jinja")}
    path.write_text(json.dumps({"method": "amopo", "dimensions": ["a"], "directives": {"dimension": named}}))
    with pytest.raises(ValueError, match="it names a file, which only the YAML of a run may do"):
        read_record(Manifest, path).prompt_settings()
    with pytest.raises(ValidationError, match="it names a file"):
        MOPOArgs(amopo={"dimensions": ["a"], "directives": {"dimension": named}})
    with pytest.raises(ConfigError, match="it names a file"):
        parse_settings(Directives, {"dimension": named}, "amopo.directives")
