"""Mutation tests: how many one-point mutants of a module its own tests notice. A script, not part of the suite.

python -m tests.mutate                 # every target below
python -m tests.mutate losses passes   # some of them

It needs mutmut (`pip install 'mutmut>=3.8,<4'`) and works in a copy of the repository. It prints how many mutants there
were, how many of them were killed, how many lie in functions that these tests do not call, and a diff of every
survivor. Whether a survivor is equivalent is for the reader to decide.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGETS = {
    "losses": ("losses.py", "tests/test_losses.py"),
    "passes": ("logprobs/passes.py", "tests/test_packing.py"),
    "metrics": ("training/metrics.py", "tests/test_trainers.py -k 'window or spread'"),
    "loss_guard": (
        "training/loss_guard.py",
        "tests/test_guarding.py -k 'first_bad_step or whatever_reads or three_rows'",
    ),
    "precompute": ("training/precompute.py", "tests/test_precompute.py"),
    "truncation": ("data/truncation.py", "tests/test_truncation.py"),
    "stats": ("data/stats.py", "tests/test_pairing.py tests/test_tools.py -k 'not cli and not train'"),
    "pairing": ("data/pairing.py", "tests/test_pairing.py tests/test_formats.py"),
    "formats": ("data/formats/*.py", "tests/test_formats.py"),
    "statistics": ("evaluation/statistics.py", "tests/test_front.py -k 'not browser and not page'"),
    "methods": ("config/methods.py", "tests/test_config.py"),
}
"""A name -> the file below `axolotl_mopo`, and the tests that must notice its mutants, in seconds."""
_SUMMARY = re.compile(r"\d+/(\d+)\s+🎉 (\d+)\s+🫥 (\d+)[^\n\r]*🙁 (\d+)")


def mutate(name: str) -> None:
    """Run one target and print its figures and survivors."""
    source, tests = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(".*", "outputs", "last_run_prepared", "site")
        shutil.copytree(ROOT, copy, ignore=ignored)
        settings = [
            "[mutmut]",
            "source_paths=axolotl_mopo",
            f"only_mutate=axolotl_mopo/{source}",
            "use_setproctitle=false",
        ]
        selection, _, expression = tests.partition(" -k ")
        settings += ["pytest_add_cli_args_test_selection=", *(f"    {path}" for path in selection.split())]
        arguments = ["-p", "no:cacheprovider", *(["-k", expression.strip("'")] if expression else [])]
        settings += ["pytest_add_cli_args=", *(f"    {argument}" for argument in arguments)]
        settings += ["also_copy=", *(f"    {part}" for part in ("example_configs", "docs", "README.md"))]
        (copy / "setup.cfg").write_text("\n".join(settings) + "\n")
        done = subprocess.run(
            ["mutmut", "run", "--max-children", "2"], cwd=copy, capture_output=True, text=True, check=False
        )
        found = _SUMMARY.findall(done.stdout)
        if not found:
            print(f"{name}: mutmut failed\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            return
        total, killed, unreached, survived = found[-1]
        print(f"{name}: {total} mutants, {killed} killed, {survived} survived, {unreached} not reached", flush=True)
        results = subprocess.run(["mutmut", "results"], cwd=copy, capture_output=True, text=True, check=False).stdout
        for mutant in re.findall(r"(\S+): survived", results):
            shown = subprocess.run(["mutmut", "show", mutant], cwd=copy, capture_output=True, text=True, check=False)
            changed = [line for line in shown.stdout.splitlines() if re.match(r"[-+](?![-+])", line)]
            print(f"  {mutant}\n    " + "\n    ".join(changed), flush=True)


if __name__ == "__main__":
    for target in sys.argv[1:] or TARGETS:
        mutate(target)
