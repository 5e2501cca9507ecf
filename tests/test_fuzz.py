"""Arbitrary YAML, rows and templates: taken as they are given, or refused with a message, and never anything else."""

import copy
import json
import math
import os
import time

import pytest
from conftest import ROOT
from datasets import Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import AMOPO, MODPO
from test_formats import GOOD, completion, rated

from axolotl_mopo.config import INTEGRATED, METHODS, SOURCES, Directives, parse_settings
from axolotl_mopo.config.model_files import ADAPTER, MANIFEST, AdapterConfig, Manifest
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.errors import ConfigError, DataError
from axolotl_mopo.plugin import MOPOPlugin
from axolotl_mopo.records import read_record
from axolotl_mopo.rewards import AdapterSource
from axolotl_mopo.rewards.resolve import resolve_source

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=300, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=20_000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

WORDS = [
    *("helpfulness", "correctness", INTEGRATED, "better", "safer", "overall", "gaussian", "mean", "hinge", "column"),
    *("length", "adapter", "reward_model", "callable", "source", "os:getcwd", "nowhere:f", "axolotl_mopo.responses"),
    *("user", "assistant", "role", "content", "N/A", "nan", "1e3", "raise", "drop", "after", "packed", "yes", "[key]"),
]
KEYS = sorted({*WORDS, *(key for block in (*METHODS.values(), *SOURCES.values()) for key in block.model_fields)})
# A path such as `/` is a folder like any other, whose files would all be read.
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=12).filter(lambda text: not set(text) & set("./~")))
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 0.5, 1.0, -0.0, math.nan, math.inf, -math.inf]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.dates(), st.binary(max_size=3))
NAMES = st.one_of(st.sampled_from(KEYS), TEXTS)


def nested(scalars, names):
    def deeper(values):
        return st.one_of(st.lists(values, max_size=3), st.dictionaries(names, values, max_size=3))

    return st.recursive(scalars, deeper, max_leaves=6)


YAML = nested(SCALARS, st.one_of(NAMES, st.integers(0, 3), st.booleans()))


def places(value):
    """Every mapping and list in a value with one of its keys, and a key that it does not have."""
    if isinstance(value, dict):
        yield value, None
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


@st.composite
def mutated(draw, valid, values, names):
    """A valid value with one or two of its parts replaced, taken out or added, at any depth."""
    value = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(value))
        if not found:
            break
        holder, key = draw(st.sampled_from(found))
        if key is None:
            holder[draw(names)] = draw(values)
        elif draw(st.integers(0, 3)) == 0:
            del holder[key]
        else:
            holder[key] = draw(values)
    return value


FULL_AMOPO = {
    **AMOPO,
    "amopo": {
        "dimensions": ["helpfulness", "correctness"],
        "integrated": True,
        "weighting": {"integrated": 0.5, "helpfulness": 0.25, "correctness": 0.25},
        "score_range": [0, 4],
        "directives": {"dimension": "{{ dimension }} {{ score }}", "integrated": "{{ dimensions | join(', ') }}"},
        "temperature": 0.5,
        "gamma": 1,
    },
    "datasets": [{"path": "pairs.jsonl", "type": "axolotl_mopo.pairs", "score_scale": [0, 4], "field_chosen": "x"}],
    "test_datasets": [{"path": "pairs.jsonl", "type": "axolotl_mopo.pairs", "split": "train"}],
}
FULL_MODPO = {
    **MODPO,
    "modpo": {
        "objective": "better",
        "weights": {"better": 0.5, "safer": 0.25, "brief": -1, "kind": 1, "short": 1},
        "margins": {
            "safer": {"source": "column", "field": "safe", "clip": [-1, 1], "normalize": "std"},
            "brief": {"source": "length", "unit": "words", "scale": 0.1},
            "kind": {"source": "adapter", "path": "no-model", "reference": "no-reference", "beta": 0.1},
            "short": {"source": "callable", "function": "textwrap:shorten", "batch_size": 8},
        },
        "beta": 0.2,
        "loss_type": "hinge",
        "max_tokens_per_pass": 64,
    },
    "datasets": [{"path": "pairs.jsonl", "type": "axolotl_mopo.pairs", "max_pairs_per_prompt": 2}],
    "seed": 3,
}
VALID = [AMOPO, MODPO, FULL_AMOPO, FULL_MODPO]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def in_force(given, parsed):
    """Whether everything that the YAML gives is in what became of it."""
    if isinstance(given, dict):
        return isinstance(parsed, dict) and all(key in parsed and in_force(given[key], parsed[key]) for key in given)
    if isinstance(given, list):
        return len(given) == len(parsed) and all(map(in_force, given, parsed))
    if isinstance(given, bytes):  # YAML's !!binary
        return given.decode() == parsed
    if isinstance(parsed, bool) and isinstance(given, str):
        return parsed is (given.lower() in ("true", "yes", "on", "1", "t", "y"))
    if isinstance(parsed, float) and isinstance(given, str | int):
        return parsed == float(given)
    return given == parsed or (given != given and parsed != parsed)  # NaN, in what is not looked at


def settled(cfg):
    """Register a configuration; what it gives is in force, or it is refused and a key is named."""
    given = copy.deepcopy(cfg)
    try:
        MOPOPlugin().register(cfg)
    except ConfigError as error:
        assert "`" in str(error)
        return
    method = given.get("rl")
    if method in ("modpo", "amopo"):
        block = {key: value for key, value in given[method].items() if value is not None}
        assert in_force(block, parse_settings(METHODS[method], cfg[method], method).model_dump())


@given(cfg=mutated(VALID, YAML, st.one_of(NAMES, st.integers(0, 3))))
def test_a_changed_configuration_is_in_force_or_refused(cfg):
    settled(cfg)


@given(block=YAML, method=st.sampled_from(["modpo", "amopo"]))
def test_an_arbitrary_block_is_in_force_or_refused(block, method):
    settled({**AMOPO, "amopo": None, "rl": method, method: block})


@given(
    cfg=st.sampled_from(VALID),
    changes=st.dictionaries(
        st.one_of(
            st.sampled_from(["modpo", "amopo", "datasets", "test_datasets", "rl", "seed", "base_model", "fsdp_config"]),
            st.sampled_from(["dataset_prepared_path", "attn_implementation", "trainer_cls", "mopo_data", "fp16"]),
            st.lists(NAMES, max_size=3).map(lambda keys: ".".join(["modpo", *keys])),
            st.lists(NAMES, max_size=3).map(lambda keys: ".".join(["amopo", *keys])),
            st.integers(),
        ),
        YAML,
        max_size=3,
    ),
)
def test_keys_beside_a_block_are_in_force_or_refused(cfg, changes):
    cfg = {**copy.deepcopy(cfg), **changes}
    try:
        MOPOPlugin().register(cfg)
    except ConfigError as error:
        assert "`" in str(error)


MESSAGES = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "q"}, {"role": "user", "content": "r"}]
RATED = [rated(text, score, 1, 2, 3, 4) for text, score in (("A", 1), ("B", 2), ("C", "N/A"))]
ROWS = {
    **{kind: [row, row] for kind, row in GOOD.items()},
    "helpsteer": RATED,
    "helpsteer2": RATED,
    "ultrafeedback": [{"instruction": "p", "completions": [completion("A", *"1234"), completion("B", *"5135")]}],
    "responses": [{"prompt": MESSAGES, "response": text, "nice": score} for text, score in (("A", 1), ("B", 2.5))],
}
OBJECTIVES = {
    "helpsteer": "helpfulness",
    "helpsteer2": "helpfulness",
    "ultrafeedback": "overall",
    "responses": "nice",
    "safe_rlhf": "safer",
}
VALUES = nested(SCALARS, st.one_of(st.sampled_from(["role", "content", "response", "h", "text"]), TEXTS))
COLUMNS = st.sampled_from(sorted({name for rows in ROWS.values() for row in rows for name in row} | {"messages"}))


class Rows:
    """Rows as the table of a data set gives them, of types that a table need not have."""

    def __init__(self, rows):
        self.column_names = list(dict.fromkeys(name for row in rows for name in row))
        self.features = Features({name: Value("string") for name in self.column_names})
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def select_columns(self, names):
        return Rows([{name: row.get(name) for name in names} for row in self.rows])

    def iter(self, batch_size):
        yield {name: [row.get(name) for row in self.rows] for name in self.column_names}


def made(kind, rows, **options):
    """Read rows as a run does: pairs, or a refusal; checked."""
    objective = (OBJECTIVES[kind],) if kind in OBJECTIVES else ()
    needed = {"amopo": ("h",), "pairs": ("h",), "helpsteer": ("helpfulness",)}.get(kind, ())
    scales = dict.fromkeys(needed, (0.0, 4.0))
    spec = DataSpec(
        where="data.jsonl", strategy=kind, options=options, objective=objective, chosen_scores=needed, scales=scales
    )
    try:
        reader = PairReader(Rows(rows), spec)
        pairs = [pair for _, pair in reader.pairs()]
    except DataError as error:
        assert str(error).startswith("data.jsonl")
        assert len(str(error)) > len("data.jsonl, row 0: ")
        return
    reader.stats.lines()
    for pair in pairs:
        assert pair == type(pair).from_row(pair.to_row())
        assert isinstance(pair.prompt_key, int)
        assert pair.prompt[-1]["role"] == "user"
        for text in (pair.prompt[-1]["content"], pair.chosen.text, pair.rejected.text):
            assert isinstance(text, str)
            assert text.strip()
        for score in (*pair.chosen.scores.values(), *pair.rejected.scores.values()):
            assert score is None or math.isfinite(score)
        assert all(0 <= pair.chosen.score(name) <= 4 for name in needed)


ON_BAD_ROW = st.sampled_from(["raise", "drop"])


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_changed_rows_give_pairs_or_are_refused(kind, data):
    changed = data.draw(mutated([ROWS[kind]], VALUES, st.one_of(COLUMNS, TEXTS)))
    made(kind, [row for row in changed if isinstance(row, dict)], on_bad_row=data.draw(ON_BAD_ROW))


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_arbitrary_rows_give_pairs_or_are_refused(kind, data):
    names = st.one_of(st.sampled_from(list(ROWS[kind][0])), COLUMNS)
    rows = data.draw(st.lists(st.dictionaries(names, VALUES, min_size=1, max_size=6), min_size=1, max_size=3))
    made(kind, rows, on_bad_row=data.draw(ON_BAD_ROW))


PIECES = [
    *("{{", "}}", "{%", "%}", "{#", "#}", "for i in ", "range(10**9)", "range(999999999)", "endfor", "if", "endif"),
    *("dimension", "dimensions", "score", "low", "high", "'x' * 9999999999", "9 ** 9 ** 9", "set a =", "| join(', ')"),
    *("| length", "|", ".", "[0]", "__class__", "(", ")", "include 'x'", "raw", "macro m()", "x", " ", "\n", "%", "1"),
    *("'{:>999999999}'.format(1)", ".format_map(", "| tojson(indent=999999999)", "| upper", "| replace('x', 'xxxx')"),
    *("| list", "| map('upper')", "| sort", "| round(99)", "| default(", "~", "+", "*", ",", "range(999)", "[1]", "-"),
    *(
        "in range(999)",
        "recursive",
        "loop",
        "loop.cycle(1)",
        "| sum",
        "| int",
        "{% for i in range(999) %}",
        "'\\ud800'",
    ),
    *("{{ dimension }}", "{{ score }}", "{% for name in dimensions %}", "{% endfor %}", "{{ name }}", "{% if score %}"),
]
TEMPLATES = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@given(template=TEMPLATES, key=st.sampled_from(["dimension", "integrated"]))
def test_an_arbitrary_template_is_taken_as_it_is_or_refused_at_once(template, key):
    started = time.process_time()
    try:
        block = parse_settings(Directives, {key: template}, "amopo.directives")
    except ConfigError as error:
        assert f"`amopo.directives.{key}`" in str(error)
    else:
        assert getattr(block, key) == template
    assert time.process_time() - started < 1


JSON = nested(st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, TEMPLATES), NAMES)
MANIFESTS = [
    {"method": "amopo", "base_model": "who/ever", **FULL_AMOPO["amopo"], "versions": {"axolotl": "1"}},
    {"method": "modpo", "base_model": "who/ever", **FULL_MODPO["modpo"], "versions": {"axolotl": "1"}},
]
ADAPTERS = [
    {"peft_type": "LORA", "base_model_name_or_path": "who/ever", "r": 8, "init_lora_weights": True},
    {"peft_type": "LORA", "r": 8, "init_lora_weights": "gaussian", "layer_replication": None, "lora_alpha": 16},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8, "r": None},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder for the records of an adapter."""
    return tmp_path_factory.mktemp("records") / "adapter"


def write_records(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@given(content=st.one_of(mutated(MANIFESTS, JSON, NAMES), JSON))
def test_an_arbitrary_record_of_a_model_is_taken_as_it_is_or_refused(model, content):
    write_records(model, mopo=content)
    try:
        manifest = read_record(Manifest, model / MANIFEST)
    except ConfigError as error:
        assert str(error).startswith(str(model / MANIFEST))
        return
    assert in_force(content, manifest.model_dump())
    try:
        block = manifest.prompt_settings()
    except ValueError:  # of pydantic, which names the key
        return
    known = {} if block is None else type(block).model_fields
    given = {key: content[key] for key in known if key in content and content[key] is not None}
    assert block is None or in_force(given, block.model_dump())


@given(
    adapter=st.one_of(mutated(ADAPTERS, JSON, st.one_of(st.sampled_from([*AdapterConfig.model_fields]), NAMES)), JSON),
    manifest=st.one_of(st.just({"method": "modpo", "beta": 0.1}), mutated(MANIFESTS, JSON, NAMES), JSON),
)
def test_an_arbitrary_adapter_gives_a_beta_or_is_refused(model, adapter, manifest):
    write_records(model, mopo=manifest, adapter_config=adapter)
    try:
        config = read_record(AdapterConfig, model / ADAPTER)
    except ConfigError as error:
        assert str(error).startswith(str(model / ADAPTER))
    else:
        assert all(adapter.get(key, value) == value for key, value in config.model_dump().items())
    try:
        beta = resolve_source(AdapterSource(source="adapter", path=str(model)), "`modpo.margins.safer", {}).beta
    except ConfigError as error:
        assert str(error).startswith("`modpo.margins.safer.")
        assert str(model) in str(error)
    else:
        assert beta == manifest["beta"]
