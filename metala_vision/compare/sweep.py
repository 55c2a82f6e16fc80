"""Commands of ours, each in a process of its own: one at a time, or one on each device."""

import contextlib
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

from metala_vision.children import ending_with_parent, own_environment
from metala_vision.errors import Stopped, UserError
from metala_vision.processes import SIGNALS

T = TypeVar("T")
INTERRUPTED = (130, -signal.SIGINT)  # exit status of a child that Ctrl-C reached


class Sweep:
    """Runs commands, and ends with them where a signal asks for it.

    Args:
        devices: what CUDA_VISIBLE_DEVICES is for each of the commands that run at a time; None
            leaves it as it is. Several share the cores, unless OMP_NUM_THREADS is set.
    """

    def __init__(self, devices: Sequence[str | None] = (None,)) -> None:
        self.free: queue.Queue[str | None] = queue.Queue()
        self.count = len(devices)
        for device in devices:
            self.free.put(device)
        self.children: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.received = 0
        self.failed = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Sweep":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._end_all()

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
        environment = own_environment()
        if self.count > 1:  # each would take all cores
            threads = max(1, (os.cpu_count() or 1) // self.count)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        errors = log.with_suffix(".err")  # while it runs: what a killed parent would lose
        try:
            with log.open("a") as out, errors.open("w") as err:
                # Left alone it would train on, and hold its run folder against the comparison
                # begun again; told to end, it saves.
                child = subprocess.Popen(
                    told, stdout=out, stderr=err, env=environment, preexec_fn=ending_with_parent()
                )
                self._wait(child)
            text = errors.read_text(encoding="utf-8", errors="replace")
            with log.open("a") as out:
                out.write(text)
            errors.unlink()
        except OSError as error:
            raise UserError(f"cannot write {log}: {error.strerror}") from error
        self._raise_if_stopped()
        status = child.returncode
        if status == 0:
            return None
        if status in INTERRUPTED:
            raise KeyboardInterrupt
        if status < 0:
            cause = ", as where memory is short" if status == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-status).name}{cause}"
        lines = text.strip().splitlines() or [f"exit status {status}"]
        return lines[-1].removeprefix("metala-vision: error: ")

    def _wait(self, child: subprocess.Popen[bytes]) -> None:
        with self.lock:
            self.children.add(child)
        try:
            if self.received or self.failed:  # between the check and the start
                child.send_signal(signal.SIGTERM)
            child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            with self.lock:
                self.children.discard(child)

    def _end_all(self) -> None:
        """The runs save and end."""
        for child in tuple(self.children):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    def _raise_if_stopped(self) -> None:
        if self.received:
            name = signal.Signals(self.received).name
            raise Stopped(self.received, f"stopped by {name}; the same command goes on")

    def each(self, jobs: Sequence[Callable[[], T]]) -> Iterator[tuple[int, T]]:
        """Number and result of each job as it ends; as many at a time as there are devices.

        Where one raises, or Ctrl-C ends it, those that run are asked to save and end, and the
        others do not begin.
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
            except BaseException:
                self.failed = True
                pool.shutdown(wait=False, cancel_futures=True)
                self._end_all()
                raise
