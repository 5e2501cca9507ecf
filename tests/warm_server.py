"""The warm process: imports once what every command of Axolotl imports, and forks for each command that is asked for.

A fork goes on as a fresh interpreter would: `__main__` is the script, and arguments, folder, environment and standard
streams are the caller's. Not imported here are `axolotl.core` and TRL's trainers: Axolotl makes its training arguments
for the plugins of a run and patches TRL, each at the first import. Nothing here may start a thread pool either, since a
fork would wait for its threads for ever.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import accelerate.data_loader
import accelerate.state
import axolotl.cli.config
import axolotl.cli.main
import axolotl.cli.train
import axolotl.common.datasets
import axolotl.train  # noqa: F401
import bitsandbytes  # noqa: F401
import evaluate  # noqa: F401
import forking  # noqa: F401
import mistral_common  # noqa: F401
import numpy
import peft  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401
import wandb  # noqa: F401

BEFORE = dict(item.split("=", 1) for item in Path("/proc/self/environ").read_text().split("\0") if item)
IMPORTS = {name: value for name, value in os.environ.items() if BEFORE.get(name) != value}
"""What importing sets."""
AT_IMPORT = {"AXOLOTL_DO_NOT_TRACK", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HF_HOME", "HF_HUB_OFFLINE"}
AT_IMPORT |= {"OMP_NUM_THREADS"}
"""Variables that libraries read when they are imported: a command cannot have its own."""


def serve(control):
    """Fork for every request until the other side closes the socket or ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who mind the commands
    while True:
        request, descriptors, *_ = socket.recv_fds(control, 1 << 20, 4)
        if not request:
            return
        if os.fork() == 0:
            control.close()
            mind(json.loads(request), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def mind(request, connection, *streams):
    """Start the command, and tell its process id and then how it ended, as `subprocess` counts."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = socket.socket(fileno=connection)
    pid = os.fork()
    if pid == 0:
        connection.close()
        leave(become(streams, **request))
    os.setpgid(pid, pid)
    for stream in (*streams, 0, 1, 2):
        os.close(stream)
    connection.send(str(pid).encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with connection:
        connection.send(str(code).encode())
    os._exit(0)


def become(streams, arguments, cwd, env):
    """Run a script, or code after `-c`, and return what the process exits with."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update({**IMPORTS, **env})
    numpy.random.seed()
    script, *others = arguments
    try:
        if other := {name for name in AT_IMPORT if env.get(name) != BEFORE.get(name)}:
            sys.exit(f"a warm process has imported what reads {', '.join(other)}: start a cold one")
        sys.path[0] = "" if script == "-c" else str(Path(script).resolve().parent)
        sys.path[1:1] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
        if script == "-c":
            sys.argv = ["-c", *others[1:]]
            exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        return left.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code):
    """End as an interpreter does."""
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    assert not accelerate.state.PartialState._shared_state
    assert threading.active_count() == 1
    assert not any(name.startswith("axolotl.core") for name in sys.modules)
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
