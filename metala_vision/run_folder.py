"""The folder of a run: what was run, on what, and how it went.

config.yaml        the resolved configuration; a run can be started from it
environment.json   command, commit, versions, machine
changes.patch      uncommitted changes of the code, where there were any
metrics.jsonl      a line per logged interval and per evaluation
curve.png          loss and accuracy over the steps
README.md          the model card
result.json        its figures; a folder that has it is finished
checkpoints/       the newest two and the best, see checkpoint.py; last and best point to two
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
import yaml

from .config import SECTIONS, Config
from .config_file import load_config
from .errors import UserError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
RESULT_FILE = "result.json"
LOCK_FILE = ".lock"
LOCK_WAIT = 15  # seconds; the data workers of a killed run end within 5, and hold it until then
PACKAGES = (
    "metala-vision", "torch", "torchvision", "timm", "accelerate", "numpy", "triton", "safetensors",
)  # fmt: skip


# What may change from one part of a run to the next: it leaves weights and metrics as they are.
FREE_KEYS = {
    "data": {"data_dir", "val_file", "workers", "max_unreadable"},
    "run": {
        "output", "run_dir", "resume", "trackers", "checkpoint_minutes", "checkpoint_hist",
        "max_skipped",
    },
}  # fmt: skip


class RunFolder:
    """The folder of a run that begins, or goes on.

    Args:
        config: the resolved configuration; run.run_dir names the folder, else a fresh one is made
            under run.output from `name` and the time. With run.resume it may hold a run already,
            of the same configuration.
        processes: of the run.
    Raises:
        UserError: where it cannot be written, is not empty, holds another run, or one that is
            being trained.
    """

    def __init__(self, config: Config, name: str, processes: int = 1) -> None:
        self.lock: TextIOWrapper | None = None
        try:
            self.path = config.run.run_dir or _fresh_folder(config.run.output, name)
            _make_folder(self.path)
            self.start = time.perf_counter()
            self._open(config, processes)
        except UserError:
            self._unlock()
            raise
        except OSError as error:
            self._unlock()
            where = config.run.run_dir or config.run.output
            raise UserError(f"cannot write the run folder {where}: {error.strerror}") from error

    def _open(self, config: Config, processes: int) -> None:
        held = sorted(p.name for p in self.path.iterdir() if p.name != LOCK_FILE)
        begun = CONFIG_FILE in held
        early = re.compile(r"environment.*\.json|changes.*\.patch|config\.yaml\.new")
        killed_at_its_start = held and all(early.fullmatch(name) for name in held)
        if held and config.run.resume is None:
            again = " or --resume auto" if begun else ""
            raise UserError(
                f"{self.path} is not empty, it holds {held[0]}; name a new --run-dir{again}"
            )
        if held and not begun and not killed_at_its_start:
            raise UserError(f"{self.path} holds {held[0]}, but no run: no {CONFIG_FILE}")
        self._lock()
        if begun:
            self._check_processes(processes)
            check_resumable(config, self.path / CONFIG_FILE)
            count = len(list(self.path.glob("environment*.json")))
            describe_environment(self.path, f"environment-{count + 1}.json", processes)
        else:
            describe_environment(self.path, ENVIRONMENT_FILE, processes)
            # A run that is begun from this file is another.
            values = config.model_dump(mode="json")
            values["run"] |= {"run_dir": None, "resume": None}
            fresh = self.path / f"{CONFIG_FILE}.new"
            fresh.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
            fresh.replace(self.path / CONFIG_FILE)  # last: a folder with it is a run
        # Opened at its beginning: `rewind` says from where on a resumed run writes.
        (self.path / METRICS_FILE).touch()
        self.metrics = (self.path / METRICS_FILE).open("r+b")

    def _check_processes(self, processes: int) -> None:
        try:
            facts = json.loads((self.path / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
            before = facts["processes"]
        except (OSError, ValueError, LookupError, TypeError):  # killed while it was written
            return
        if before != processes:
            raise UserError(
                f"the run in {self.path} is on {before} process(es), this is {processes}: an exact "
                "resume needs as many"
            )

    def _lock(self) -> None:
        """For as long as this process lives."""
        self.lock = (self.path / LOCK_FILE).open("a")
        end = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise UserError(f"another process is training in {self.path}") from error
                time.sleep(0.2)

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def rewind(self, metrics_bytes: int, seconds: float) -> None:
        """Go back to the metrics of a checkpoint, and go on with its clock.

        Raises:
            UserError: where the file is shorter.
        """
        path = self.path / METRICS_FILE
        if path.stat().st_size < metrics_bytes:
            raise UserError(f"{path} is shorter than it was at the checkpoint")
        self.metrics.truncate(metrics_bytes)
        self.metrics.seek(metrics_bytes)
        self.start = time.perf_counter() - seconds

    def sync(self) -> int:
        """The metrics to the disk; their length so far."""
        try:
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path / METRICS_FILE}: {error.strerror}") from error
        return self.metrics.tell()

    def seconds(self) -> float:
        """Of the run so far, without the time it was stopped."""
        return time.perf_counter() - self.start

    def log(self, event: str, **values: Any) -> None:
        """Append a line to metrics.jsonl; `seconds` counts from the start of the run."""
        seconds = round(self.seconds(), 3)
        line = json.dumps({"event": event, **values, "seconds": seconds}, allow_nan=False)
        try:
            self.metrics.write((line + "\n").encode())
            self.metrics.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path / METRICS_FILE}: {error.strerror}") from error

    def finish(self, facts: dict[str, Any]) -> None:
        """Write result.json."""
        path = self.path / RESULT_FILE
        fresh = path.with_name(f"{RESULT_FILE}.new")
        try:
            fresh.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the metrics; every line was flushed when it was written."""
        with contextlib.suppress(OSError):
            self.metrics.close()
        self._unlock()


def resumed_config(config: Config) -> Config:
    """The same, with the folder that run.resume names as its run_dir.

    Raises:
        UserError: for a folder that holds no run.
    """
    resume = config.run.resume
    if resume is None:
        return config
    config = config.model_copy(deep=True)
    if resume == "auto":
        if config.run.run_dir is None:
            raise UserError("run.resume='auto' goes on with the run in --run-dir, which is missing")
        return config
    folder = Path(resume).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"run.resume={resume!r}: no run in it, {CONFIG_FILE} is missing")
    if config.run.run_dir and config.run.run_dir.resolve() != folder.resolve():
        raise UserError(f"run.resume={resume!r}, but run.run_dir is {config.run.run_dir}; drop it")
    config.run.run_dir = folder
    return config


def check_resumable(config: Config, path: Path) -> None:
    """UserError where a run of another configuration lies there, naming the first difference."""
    check_same(config, path, f"the run in {path.parent}", "a resumed run keeps its configuration")


def check_same(
    config: Config, path: Path, what: str, why: str = "take another folder",
    free: dict[str, set[str]] = FREE_KEYS,
) -> None:  # fmt: skip
    """UserError where the configuration in that file differs in a key that is not free."""
    before = load_config(str(path))
    for section in SECTIONS:
        now, then = (getattr(c, section).model_dump() for c in (config, before))
        for key, value in now.items():
            if key not in free.get(section, ()) and value != then[key]:
                raise UserError(f"{section}.{key} is {value!r}, {what} has {then[key]!r}: {why}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = (path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def code_version() -> str | None:
    """The commit of this package's checkout, with a + where its code differs; None for none."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return commit.decode().strip() + ("+" if _git("diff", "HEAD", "--name-only") else "")


def describe_environment(folder: Path, name: str, processes: int) -> None:
    """Write `name`, and a patch where tracked code differs from its commit."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("diff", "HEAD", "--binary") if commit else None
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    facts = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit.decode().strip() if commit else None,
        "uncommitted_changes": bool(changes),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": processes,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    (folder / name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if changes:
        patch = Path(name).stem.replace("environment", "changes")
        (folder / f"{patch}.patch").write_bytes(changes)


def _fresh_folder(output: Path, name: str) -> Path:
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    _make_folder(output)
    for count in itertools.count(1):
        folder = output / (stem if count == 1 else f"{stem}-{count}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.mkdir(parents=True, exist_ok=True)


def _git(*arguments: str) -> bytes | None:
    """git's answer for the checkout that holds this package; None where it lies in none."""

    def ask(*words: str) -> subprocess.CompletedProcess[bytes]:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, timeout=30)

    try:
        if ask("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return None
        answer = ask(*arguments)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
