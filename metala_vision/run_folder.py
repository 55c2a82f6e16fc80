"""The folder of a run: what was run, on what, and how it went.

config.yaml        the resolved configuration; a run can be started from it
environment.json   command, commit, versions, machine
changes.patch      uncommitted changes of the code, where there were any
metrics.jsonl      a line per logged interval and per evaluation
curve.png          loss and accuracy over the steps
best/, last/       checkpoints
"""

import importlib.metadata
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
        UserError: where it cannot be written or holds a run already.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.path = config.run.run_dir or _fresh_folder(config.run.output, name)
        if (self.path / METRICS_FILE).exists():
            raise UserError(f"{self.path} holds a run already; name another --run-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (self.path / "config.yaml").write_text(resolved, encoding="utf-8")
            describe_environment(self.path)
            self.metrics = (self.path / METRICS_FILE).open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror}") from error
        self.start = time.perf_counter()

    def log(self, event: str, **values: Any) -> None:
        """Append a line to metrics.jsonl; `seconds` counts from the start of the run."""
        seconds = round(time.perf_counter() - self.start, 3)
        self.metrics.write(json.dumps({"event": event, **values, "seconds": seconds}) + "\n")
        self.metrics.flush()

    def close(self) -> None:
        self.metrics.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = (path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def describe_environment(folder: Path) -> None:
    """Write environment.json, and changes.patch where the code differs from its commit."""
    code = Path(__file__).parent
    commit = _git(code, "rev-parse", "HEAD")
    changes = _git(code, "diff", "HEAD") if commit else None
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    facts = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
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
        (folder / "changes.patch").write_text(changes + "\n", encoding="utf-8")


def _fresh_folder(output: Path, name: str) -> Path:
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, count = output / stem, 1
    while folder.exists():
        count += 1
        folder = output / f"{stem}-{count}"
    return folder


def _git(folder: Path, *arguments: str) -> str | None:
    """git's answer for the checkout that holds this package; None where it lies in none."""
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=folder, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        if tracked.returncode:
            return None
        answer = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
