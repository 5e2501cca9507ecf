"""Render an untrusted chat template in a separate process first, before it is rendered in this one.

transformers renders chat templates in Jinja's sandbox, which limits neither time nor memory, and chat templates need
more of Jinja than directives do. So a fork with limits renders the first conversation of every template. This finds
templates that exhaust the machine with any conversation, but not those that do so only with a certain text.
"""

import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from axolotl_mopo.digests import text_digest

_CPU_SECONDS = 5
_MEMORY_BYTES = 1 << 30
"""Bytes that rendering may allocate in addition to those of the process."""
_MAX_CHARACTERS = 1_000_000
_WALL_SECONDS = 30.0
"""Seconds of wall-clock time after which a fork is killed."""
_OUT_OF_MEMORY, _TOO_LONG = 3, 4
_POLL_SECONDS = 0.01

_refusals: dict[str, str | None] = {}


def check_chat_template(template: str, render: Callable[[], str]) -> None:
    """Render a template in a fork the first time that it is used.

    Args:
        template: identifies the template.
        render: renders a conversation with it.

    Raises:
        ValueError: if that takes too much time or memory, or the text is too long.
    """
    key = text_digest(template)
    if key not in _refusals:
        _refusals[key] = _render_in_fork(render) if sys.platform == "linux" else None
    if refusal := _refusals[key]:
        raise ValueError(f"{refusal}; choose another `chat_template:`, or a tokenizer that you trust")


def _render_in_fork(render: Callable[[], str]) -> str | None:
    """Return the error that a fork with limits finds; None if it finds none, or the system cannot fork."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about forks with threads; this fork only renders
            child = os.fork()
    except OSError:
        return None
    if child == 0:
        _render_and_exit(render)
    match _wait_for(child):
        case code if code == _OUT_OF_MEMORY:
            return f"it takes more than {_MEMORY_BYTES >> 20:,} MiB"
        case code if code == _TOO_LONG:
            return f"it writes more than {_MAX_CHARACTERS:,} characters"
        case code if code == -signal.SIGXCPU:
            return f"it takes more than {_CPU_SECONDS} seconds"
        case code if code == -signal.SIGKILL:
            return "the system killed the process that rendered it, probably because memory ran out"
    return None


def _render_and_exit(render: Callable[[], str]) -> NoReturn:
    """Render in the fork and report limits by the exit code; all other errors occur in the parent process as well."""
    code = 0
    try:
        gc.disable()  # objects of the parent must not be finalised in the fork
        _limit_resources()
        code = _TOO_LONG if len(render()) > _MAX_CHARACTERS else 0
    except MemoryError:
        code = _OUT_OF_MEMORY
    except BaseException:
        code = 0
    finally:
        os._exit(code)


def _limit_resources() -> None:
    import resource

    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for kind, limit in (
        (resource.RLIMIT_AS, mapped + _MEMORY_BYTES),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _wait_for(child: int) -> int | None:
    """Wait for the fork and return its exit code; None if it did not end and was killed."""
    deadline = time.monotonic() + _WALL_SECONDS
    with suppress(ChildProcessError):  # if this process ignores SIGCHLD
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(_POLL_SECONDS)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None
