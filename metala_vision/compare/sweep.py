"""Commands of ours, each in a process of its own: one at a time, or one on each device."""

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from metala_vision.errors import Stopped, UserError
from metala_vision.processes import SIGNALS

T = TypeVar("T")
INTERRUPTED = (130, -signal.SIGINT)  # exit status of a child that Ctrl-C reached


class Sweep:
    """Runs commands, and ends with them where a signal asks for it.

    Args:
        devices: what CUDA_VISIBLE_DEVICES is for each of the commands that run at a time; None
            leaves it as it is.
    """

    def __init__(self, devices: Sequence[str | None] = (None,)) -> None:
        self.free: queue.Queue[str | None] = queue.Queue()
        self.count = len(devices)
        for device in devices:
            self.free.put(device)
        self.children: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.received = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Sweep":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """The runs save and end."""
        self.received = number
        for child in tuple(self.children):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    def run(self, command: str, flags: Sequence[str], log: Path) -> str | None:
        """One command, on a device that is free; None, or the last line told of its failure.

        Raises:
            Stopped: where a signal ended it. KeyboardInterrupt: where Ctrl-C did.
            UserError: for a log that cannot be written.
        """
        self._raise_if_stopped()
        device = self.free.get()
        try:
            return self._run([sys.executable, "-m", "metala_vision", command, *flags], log, device)
        finally:
            self.free.put(device)

    def _run(self, told: list[str], log: Path, device: str | None) -> str | None:
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        try:
            with log.open("a") as file:
                child = subprocess.Popen(
                    told, stdout=file, stderr=subprocess.PIPE, text=True, env=environment,
                    preexec_fn=_end_with_parent if LIBC is not None else None,
                )  # fmt: skip
                with self.lock:
                    self.children.add(child)
                try:
                    if self.received:  # between the check and the start
                        child.send_signal(signal.SIGTERM)
                    _, stderr = child.communicate()
                except BaseException:
                    child.terminate()
                    child.wait()
                    raise
                finally:
                    with self.lock:
                        self.children.discard(child)
                file.write(stderr)
        except OSError as error:
            raise UserError(f"cannot write {log}: {error.strerror}") from error
        if child.returncode == 0:
            return None
        self._raise_if_stopped()
        if child.returncode in INTERRUPTED:
            raise KeyboardInterrupt
        lines = stderr.strip().splitlines()
        if not lines:
            return f"exit status {child.returncode}"
        return lines[-1].removeprefix("metala-vision: error: ")

    def _raise_if_stopped(self) -> None:
        if self.received:
            name = signal.Signals(self.received).name
            raise Stopped(self.received, f"stopped by {name}; the same command goes on")

    def each(self, jobs: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T]]:
        """Number and result of each job as it ends; as many at a time as there are devices.

        Jobs that have not begun are dropped where one raises.
        """
        if self.count == 1:  # in this thread, which Ctrl-C reaches
            for number, job in enumerate(jobs):
                yield number, job()
            return
        with ThreadPoolExecutor(self.count) as pool:
            waiting = {pool.submit(job): number for number, job in enumerate(jobs)}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _libc() -> Any:
    try:
        return ctypes.CDLL(None) if sys.platform == "linux" else None
    except OSError:
        return None


LIBC = _libc()
PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In a child before it becomes its program: save and end should its parent be killed.

    Left alone it would train on and hold its run folder against the comparison begun again.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
