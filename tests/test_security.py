"""A shared YAML is not to be trusted, and the package does nothing that would make it worse."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT
from test_config import AMOPO, changed, refusal

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
            names = [node.module or ""]
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
    assert {path.name: found for path in SOURCES if (found := faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
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
    assert importing == {"functions.py"}


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


def test_a_configuration_without_the_plugin_before_ours_in_one_process_is_named():
    code = """
import sys
import axolotl.core.training_args
from axolotl.utils.dict import DictDefault
from axolotl_mopo import MOPOPlugin
try:
    MOPOPlugin().get_training_args(DictDefault({"amopo": {"dimensions": ["a"]}}))
except ValueError as error:
    sys.exit(0 if "list `axolotl_mopo.MOPOPlugin` there too" in str(error) else str(error))
sys.exit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
