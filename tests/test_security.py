"""A shared YAML is not to be trusted, and the package does nothing that would make it worse."""

import ast
import json
import os
import re
import socket
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest
from axolotl.utils.dict import DictDefault
from conftest import ROOT, host_trainer, smoke_config
from datasets.config import HF_DATASETS_CACHE
from test_config import AMOPO, MODPO, changed, refusal
from warm import python

from axolotl_mopo import MOPOPlugin
from axolotl_mopo.errors import ConfigError

SOURCES = sorted((ROOT / "axolotl_mopo").rglob("*.py"))
CODE = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}
PROCESSES = {"subprocess", "pty", "popen2"}


def faults(source):
    """What a module may not do, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            errors_alone = all(alias.name.endswith("Error") for alias in node.names)
            names = [] if errors_alone else [node.module or ""]
        found += [(node.lineno, name) for name in names if name.split(".")[0] in PICKLES | NETWORK | PROCESSES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in CODE or called in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
            found.append((node.lineno, called))
        if called == "torch.load" and given.get("weights_only") != "True":
            found.append((node.lineno, called))
        if "trust_remote_code" in given or given.get("allow_pickle") == "True" or given.get("shell") == "True":
            found.append((node.lineno, called))
    return found


def test_the_package_runs_no_code_from_data_and_opens_no_connection_of_its_own():
    assert len(SOURCES) > 50
    found = {path.name: names for path in SOURCES if (names := [name for _, name in faults(path.read_text())])}
    # `axolotl mopo smoke` starts `axolotl train`, and trusts remote code only if its own option says so.
    loads = ["AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained"]
    assert found == {"smoke.py": ["subprocess"], "tiny_models.py": loads}
    tiny_models = (ROOT / "axolotl_mopo" / "commands" / "tiny_models.py").read_text()
    assert tiny_models.count("trust_remote_code") == tiny_models.count("trust_remote_code=trust)") == 2


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from pickle import UnpicklingError, loads",
        "from urllib.request import urlopen",
        "import subprocess",
        "os.system('true')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "run(text, shell=True)",
    ],
)
def test_the_walk_finds_what_it_looks_for(source):
    assert faults(source)


def test_code_is_imported_by_name_in_one_place_only():
    importing = {path.name for path in SOURCES if "import_module(" in path.read_text()}
    assert importing == {"function.py"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ dimensions.__class__ }}",
        "{{ dimensions['__class__'] }}",
        "{{ dimensions | attr('__class__') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__}'.format(dimensions) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__ }}",
        "{% import 'os' as os %}{{ os }}",
        "{% include '/etc/passwd' %}",
        "{% extends '/etc/passwd' %}",
        "{% do dimensions.append('x') %}",
        "{{ dimensions.append('x') }}",
        "{% set dimensions.x = 1 %}",
    ],
)
def test_directives_cannot_reach_out_of_their_sandbox(template):
    assert "amopo.directives.integrated" in refusal(changed(AMOPO, amopo__directives={"integrated": template}))


TORCH_CACHE = f"{tempfile.gettempdir()}/torchinductor_"
PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")


class Seen:
    """What this process opens for writing and whom it calls; an audit hook stays for good, so it is turned off."""

    def __init__(self):
        self.on, self.written, self.called = False, set(), []
        sys.addaudithook(self.note)

    def note(self, event, args):
        if not self.on:
            return
        if event == "socket.getaddrinfo" or (event == "socket.connect" and args[0].family != socket.AF_UNIX):
            self.called.append(args)
        elif event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            if not PART.fullmatch(args[0]):  # in a folder that is opened, and told of when it is renamed
                self.written.add(args[0])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.written.update(changed_paths(event, args))

    def __enter__(self):
        self.written.clear()
        self.called.clear()
        self.on = True
        return self

    def __exit__(self, *_):
        self.on = False


def changed_paths(event, args):
    """What a call changes, also where it is told a folder and a name in it."""
    places = {"os.mkdir": [(0, 2)], "os.rename": [(0, 2), (1, 3)]}.get(event, [(0, 1)])
    for name, folder in places:
        inside = "" if args[folder] in (-1, None) else f"{Path(f'/proc/self/fd/{args[folder]}').readlink()}/"
        yield f"{inside}{args[name]}"


@pytest.fixture(scope="module")
def seen():
    return Seen()


EVIL = "../../evil"
METHODS = {
    "amopo": {"dimensions": [EVIL]},
    "modpo": {
        "objective": EVIL,
        "weights": {EVIL: 0.5, f"{EVIL}2": 0.5},
        "margins": {f"{EVIL}2": {"source": "column", "field": "correctness"}},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_only_where_the_yaml_says_and_calls_nobody(method, tmp_path, seen, monkeypatch):
    """Names are not paths: one that looks like a path out of the folders stays a name."""
    # The path of a socket in it must be short.
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp())
    rows = [json.loads(line) for line in (ROOT / "example_configs" / "smoke" / "pairs.jsonl").open()][:16]
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_scores"][EVIL] = row[f"{side}_scores"]["correctness"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": "axolotl_mopo.pairs"}
    if method == "amopo":
        entry["score_scale"] = [0, 4]
    overrides = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "test_datasets": None}
    cfg = smoke_config(
        method, tmp_path / "run", datasets=[entry], eval_strategy="no", **overrides, **{method: METHODS[method]}
    )
    with seen:
        trainer = host_trainer(cfg)
        trainer.train()
    assert seen.called == []
    caches = (
        tempfile.gettempdir(),
        TORCH_CACHE,
        HF_DATASETS_CACHE,
        matplotlib.get_cachedir(),
        matplotlib.get_configdir(),
    )
    allowed = [cfg["output_dir"], cfg["dataset_prepared_path"]]
    strays = {path for path in seen.written if not path.startswith((*allowed, *map(str, caches), "/dev/"))}
    assert {path for path in strays if not any(each.startswith(path) for each in allowed)} == set()
    assert any(path.startswith(allowed[0]) and path.endswith("mopo.json") for path in seen.written)
    assert not list(tmp_path.parent.rglob("*evil*"))


@pytest.mark.parametrize(
    ("margin", "words"),
    [
        (
            {"source": "callable", "function": "textwrap:shorten"},
            "`modpo.margins.safer.function` imports and runs the code of textwrap:shorten.",
        ),
        (
            {"source": "reward_model", "path": "who/ever"},
            "`modpo.margins.safer.path`: who/ever is not a local folder and is downloaded from the model hub.",
        ),
        (
            {"source": "adapter", "path": "who/ever", "reference": "who/else", "beta": 1},
            "`modpo.margins.safer.reference`: who/else is not a local folder and is downloaded from the model hub.",
        ),
    ],
)
def test_the_log_says_what_a_shared_yaml_imports_or_downloads(margin, words, host_log):
    MOPOPlugin().register(DictDefault(changed(MODPO, modpo__margins={"safer": margin})))
    assert words in host_log.text


def test_a_reward_model_of_the_hub_is_not_asked_for_offline(tmp_path, seen):
    """HF_HUB_OFFLINE is set for all tests."""
    margins = {"b": {"source": "reward_model", "path": "who/ever"}}
    block = {"objective": "overall", "weights": {"overall": 0.5, "b": 0.5}, "margins": margins}
    trainer = host_trainer(smoke_config("modpo", tmp_path, modpo=block))
    with seen, pytest.raises(ConfigError, match="the model who/ever cannot be loaded"):
        trainer.train()
    assert seen.called == []


def test_a_configuration_without_the_plugin_before_ours_in_one_process_is_named():
    code = """
import sys
import axolotl.core.training_args
from axolotl.utils.dict import DictDefault
from axolotl_mopo import MOPOPlugin
from axolotl_mopo.errors import ConfigError
try:
    MOPOPlugin().get_training_args(DictDefault({"amopo": {"dimensions": ["a"]}}))
except ValueError as error:
    sys.exit(0 if "list `axolotl_mopo.MOPOPlugin` there too" in str(error) else str(error))
sys.exit("no error")
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
