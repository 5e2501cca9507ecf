"""What the plugin adds to the start of `axolotl train`: `python -m tests.benchmarks.startup`."""

import os
import statistics
import subprocess
import sys

_SCRIPT = """
import time, yaml
import axolotl.cli.main, axolotl.cli.config, axolotl.integrations.base
cfg = yaml.safe_load(open("example_configs/smoke-modpo.yaml"))
start = time.perf_counter()
from axolotl_mopo import MOPOPlugin
MOPOPlugin().register(cfg)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Import and register in new processes, after the host's own imports, and print the median."""
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT]
    runs = [subprocess.run(command, env=environment, check=True, capture_output=True, text=True) for _ in range(5)]
    seconds = [float(run.stdout.splitlines()[-1]) for run in runs]
    print(f"import and register: {statistics.median(seconds):.3f} s (5 runs, {min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
