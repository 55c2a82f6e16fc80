"""The folder of a run: what was run, on what, and how it went.

config.yaml        the resolved configuration; a run can be started from it
environment.json   command, commit, versions, machine
changes.patch      uncommitted changes of the code, where there were any
metrics.jsonl      a line per logged interval and per evaluation
curve.png          loss and accuracy over the steps
README.md          the model card
best/, last/       checkpoints
"""

import contextlib
import errno
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from .config import Config
from .errors import UserError

METRICS_FILE = "metrics.jsonl"
PACKAGES = (
    "metala-vision", "torch", "torchvision", "timm", "accelerate", "numpy", "triton", "safetensors",
)  # fmt: skip


class RunFolder:
    """A new run folder.

    Args:
        config: the resolved configuration; run.run_dir names the folder, else a fresh one is made
            under run.output from `name` and the time.
    Raises:
        UserError: where it cannot be written or is not empty.
    """

    def __init__(self, config: Config, name: str) -> None:
        try:
            self.path = config.run.run_dir or _fresh_folder(config.run.output, name)
            _make_folder(self.path)
            held = sorted(p.name for p in self.path.iterdir())
            if held:
                raise UserError(
                    f"{self.path} is not empty, it holds {held[0]}; name a new --run-dir"
                )
            resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (self.path / "config.yaml").write_text(resolved, encoding="utf-8")
            describe_environment(self.path)
            self.metrics = (self.path / METRICS_FILE).open("w", encoding="utf-8")
        except OSError as error:
            where = config.run.run_dir or config.run.output
            raise UserError(f"cannot write the run folder {where}: {error.strerror}") from error
        self.start = time.perf_counter()

    def log(self, event: str, **values: Any) -> None:
        """Append a line to metrics.jsonl; `seconds` counts from the start of the run."""
        seconds = round(time.perf_counter() - self.start, 3)
        line = json.dumps({"event": event, **values, "seconds": seconds}, allow_nan=False)
        try:
            self.metrics.write(line + "\n")
            self.metrics.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path / METRICS_FILE}: {error.strerror}") from error

    def close(self) -> None:
        """Close the metrics; every line was flushed when it was written."""
        with contextlib.suppress(OSError):
            self.metrics.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = (path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def describe_environment(folder: Path) -> None:
    """Write environment.json, and changes.patch where tracked code differs from its commit."""
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
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if changes:
        (folder / "changes.patch").write_bytes(changes)


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
