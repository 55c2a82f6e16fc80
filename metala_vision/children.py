"""The processes that this one starts."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # Linux's sys/prctl.h


def own_environment() -> dict[str, str]:
    """Of a child process: this one's, in which Python finds this package from any folder."""
    own, given = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    path = own if not given else f"{own}{os.pathsep}{given}"
    return {**os.environ, "PYTHONPATH": path}


def ending_with_parent(number: int = signal.SIGTERM) -> Callable[[], None] | None:
    """For Popen's preexec_fn: the child gets this signal should this process be killed.

    More exactly, should the thread end that started it. None where the system has no such thing
    (Linux alone has it): a child is left alone there.
    """
    return None if LIBC is None else partial(end_with_parent, number, os.getpid())


def end_with_parent(number: int, parent: int) -> None:
    """In the child: get this signal should its parent, the process of this number, be killed."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # killed before that
            os._exit(1)


def _libc() -> Any:
    try:
        return ctypes.CDLL(None) if sys.platform == "linux" else None
    except OSError:
        return None


LIBC = _libc()
