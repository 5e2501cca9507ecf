"""Commands and scripts as forks of a warm process, which spares each of them its imports; see `warm_server.py`."""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
AXOLOTL = Path(sys.executable).parent / "axolotl"
AT_IMPORT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""What libraries read when they are imported, the same for all forks."""
ENVIRONMENT = {**os.environ, **AT_IMPORT}
"""That of the warm process: as it is before a test changes it."""


class Server:
    """The warm process, started when it is first needed; it ends with this one."""

    def __init__(self):
        self.lock, self.control = threading.Lock(), None
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115

    def ask(self, request, descriptors):
        """Send a request, with the descriptors of the fork's connection and standard streams."""
        with self.lock:
            if self.control is None:
                self._start()
        socket.send_fds(self.control, [json.dumps(request).encode()], descriptors)

    def _start(self):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "warm_server.py", str(theirs.fileno())],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        atexit.register(process.terminate)

    def said(self):
        """What the warm process itself wrote, for when it ended."""
        return text(self.output)[-5000:]


SERVER = Server()


def text(file):
    """All that others wrote to a temporary file."""
    file.seek(0)
    return file.read()


class Process:
    """A script, or code after `-c`, in a fork of the warm process; to be used as a `subprocess.Popen` of Python is.

    Args:
        arguments: what stands after `python` on a command line.
        stdout, stderr: files; what is written to none is thrown away.
    """

    def __init__(self, *arguments, cwd=ROOT, env=None, stdout=None, stderr=None):
        self.returncode = None
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, **AT_IMPORT, **(env or {})}
        request = {"arguments": [*map(str, arguments)], "cwd": str(cwd), "env": env}
        with theirs, Path(os.devnull).open("r+b") as nothing:
            streams = [(stream or nothing).fileno() for stream in (None, stdout, stderr)]
            SERVER.ask(request, [theirs.fileno(), *streams])
        self.pid = self._receive()

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = self._receive()
            self.connection.close()
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _receive(self):
        message = self.connection.recv(64)
        assert message, f"the warm process ended: {SERVER.said()}"
        return int(message)


def python(*arguments, timeout=600, **settings):
    """Run a script, or code after `-c`, to its end: how it ended, and its standard output and error."""
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = Process(*arguments, stdout=out, stderr=err, **settings)
        try:
            process.wait(timeout)
        finally:
            if process.returncode is None:
                process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, text(out), text(err))


def ranks(script, *arguments, processes=2, env=None, timeout=600):
    """Run a script of this folder in several processes that can talk, with the environment that torchrun gives them.

    When one fails, or time is up, all are ended. Returns what each wrote to its standard output and error.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # so that no port has to be guessed
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        **(env or {}),
    }
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(processes)]
        running = [
            Process(
                ROOT / "tests" / script,
                *arguments,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank, output in enumerate(outputs)
        ]
        failure = wait_for_all(running, timeout)
        said = [text(output) for output in outputs]
    parts = (f"--- rank {rank}\n{output[-5000:]}" for rank, output in enumerate(said))
    assert failure is None, "\n".join([failure, *parts])
    return said


def wait_for_all(processes, timeout):
    """Wait until all have ended well; else end them, and return what was amiss."""
    deadline = time.monotonic() + timeout
    try:
        while left := {process.connection: process for process in processes if process.returncode is None}:
            ready, *_ = select.select(list(left), [], [], max(0, deadline - time.monotonic()))
            if not ready:
                return f"{len(left)} of {len(processes)} processes still ran after {timeout} seconds"
            for connection in ready:
                if left[connection].wait():
                    return f"rank {processes.index(left[connection])} ended with {left[connection].returncode}"
        return None
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                process.wait()
