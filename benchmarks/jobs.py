"""The order of what models.py measures, and the processes that do it."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from results import FAILED, NOT_RUN, end_group, last_line, limited, start
from subjects import DEIT, INFERENCE, OURS, SMALL, TRAINING

SCRIPT = Path(__file__).with_name("models.py")
WHAT = (TRAINING, INFERENCE)
KEYS = ("model", "size", "compiled", "what")


class Job(NamedTuple):
    """What one process measures: of a compiled model one size, for a size is what takes long."""

    model: str
    sizes: tuple[int, ...]
    compiled: bool

    def rows(self) -> list[dict]:
        """What its rows begin with."""
        one = {"model": self.model, "compiled": self.compiled}
        return [{**one, "size": size, "what": what} for size in self.sizes for what in WHAT]


def plan(models: list[str], peers: list[str], sizes: list[int], compiled: list[bool]) -> list[Job]:
    """Every model, size and way once, what the goals are about first."""

    def place(job: Job) -> tuple:
        named = job.sizes[0] in (224, 1024)
        if job.model in (OURS, DEIT):
            group = 2 if not job.compiled else 0 if named else 1
        elif job.model in SMALL or job.model in peers:
            group = 3 if job.compiled and named else 5
        else:
            group = 4 if job.compiled and named else 6
        return group, not named, job.sizes[0], [*models, *peers].index(job.model)

    names = [*models, *peers]
    jobs = [Job(name, (size,), True) for name in names for size in sizes if True in compiled]
    jobs += [Job(name, tuple(sizes), False) for name in names if False in compiled]
    return sorted(jobs, key=place)


class Runner:
    """Processes for jobs; what they say lies in the folder."""

    def __init__(self, peers: list[str], limit: float, folder: Path) -> None:
        self.peers, self.limit, self.folder = peers, limit, folder
        self.compiled: set[Job] = set()
        self.told: SystemExit | None = None  # to end, while a process was at work
        folder.mkdir(parents=True, exist_ok=True)

    def _paths(self, job: Job, way: str) -> tuple[Path, Path]:
        """Of its rows and of its log; a model's name may have a dot."""
        name = f"{job.model}_{'_'.join(map(str, job.sizes))}_{way}"
        return self.folder / f"{name}.jsonl", self.folder / f"{name}.txt"

    def _command(self, job: Job, out: Path, *more: str) -> list[str]:
        flags = [f for text in self.peers for f in ("--peer", text)]
        flags += ["--compiled"] if job.compiled else []
        sizes = [str(size) for size in job.sizes]
        return [
            sys.executable, str(SCRIPT), "run", "--out", str(out), "--child", job.model,
            "--sizes", *sizes, *flags, *more,
        ]  # fmt: skip

    def compile_ahead(self, jobs: list[Job], seconds: float) -> None:
        """These at once; one that fails or is too slow will show itself when it is measured."""
        started = []
        for job in jobs:
            self.compiled.add(job)
            out, log = self._paths(job, "ahead")
            started.append(start(self._command(job, out, "--only-compile"), log))
        last = time.monotonic() + min(seconds, self.limit)
        try:
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, last - time.monotonic()))
        finally:
            for process in started:  # nothing of theirs is to be saved
                end_group(process, signal.SIGKILL)

    def rows(self, job: Job, seconds: float) -> list[dict]:
        """Its rows, up to the size that its process did not live to end.

        Told to end, it remembers that, for its caller to end when the rows are saved.
        """
        out, log = self._paths(job, "compiled" if job.compiled else "eager")
        out.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        limit = self.limit * len(job.sizes)
        try:
            status = limited(self._command(job, out), min(seconds, limit), log)
        except SystemExit as error:  # what there is already is not to be lost
            self.told, status, seconds = error, None, 0.0
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        found = [json.loads(line) for line in lines]
        if status is not None:
            missing = f"{FAILED}: {last_line(log)}"
        else:
            missing = NOT_RUN if seconds < limit else f"stopped after {limit:.0f} s"
        behind = job.rows()[len(found) :]
        last = [row for row in behind if row["size"] == behind[0]["size"]]
        return found + [{**row, "status": missing} for row in last]
