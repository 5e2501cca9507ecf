"""Tries a chat template that may come from anybody in a process of its own, before it is rendered in this one.

transformers renders chat templates in Jinja's sandbox, which bounds neither time nor memory, and they need more of
Jinja than directives do. So the first conversation of every template is rendered by a fork with limits. This finds
templates that take the machine with any conversation; one that waits for a certain text is not found.
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
_MEMORY = 1 << 30
"""Bytes that a rendering may take beyond what the process has."""
_LONGEST_TEXT = 1_000_000
_WAIT = 30.0
"""Seconds after which a fork that got no CPU is given up."""
_OUT_OF_MEMORY, _TOO_LONG = 3, 4
_SOON = 0.01

_refusals: dict[str, str | None] = {}


def check_chat_template(template: str, render: Callable[[], str]) -> None:
    """Try a template the first time that it is seen.

    Args:
        template: by which it is known again.
        render: renders some conversation with it.

    Raises:
        ValueError: where that takes too much time or memory, or gives too long a text.
    """
    key = text_digest(template)
    if key not in _refusals:
        _refusals[key] = _tried(render) if sys.platform == "linux" else None
    if refusal := _refusals[key]:
        raise ValueError(f"{refusal}; choose another `chat_template:`, or a tokenizer that you trust")


def _tried(render: Callable[[], str]) -> str | None:
    """What a fork with limits finds wrong; None where it finds nothing, or no fork can be made."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; this one only renders
            child = os.fork()
    except OSError:
        return None
    if child == 0:
        _render_and_exit(render)
    match _ending(child):
        case code if code == _OUT_OF_MEMORY:
            return f"it takes more than {_MEMORY >> 20:,} MiB"
        case code if code == _TOO_LONG:
            return f"it writes more than {_LONGEST_TEXT:,} characters"
        case code if code == -signal.SIGXCPU:
            return f"it takes more than {_CPU_SECONDS} seconds"
        case code if code == -signal.SIGKILL:
            return "the system ended a process that rendered it, as it does where memory is used up"
    return None


def _render_and_exit(render: Callable[[], str]) -> NoReturn:
    """What the fork does; whatever else it finds, this process finds as well."""
    code = 0
    try:
        gc.disable()  # objects of this process must not be finalized here
        _limit_resources()
        code = _TOO_LONG if len(render()) > _LONGEST_TEXT else 0
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
        (resource.RLIMIT_AS, mapped + _MEMORY),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _ending(child: int) -> int | None:
    """How the fork ended, as a return code; None where it did not, and was ended here."""
    deadline = time.monotonic() + _WAIT
    with suppress(ChildProcessError):  # where this process ignores how its children end
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(_SOON)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None
