"""Checkpoints: folders that timm loads, with the state that training needs beside the weights.

    RUN/checkpoints/step-00000120/    model.safetensors, config.json, training_state.pt and
                                      manifest.json
    RUN/last, RUN/best                links to two of them

A folder gets its name when every file in it is on the disk, and is never written again. Its
manifest holds size and sha256 of each file; what does not match is not loaded.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .errors import UserError, one_line, worker_died
from .weights.check import sha256_of

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
STATE_FILE = "training_state.pt"
MANIFEST_FILE = "manifest.json"
FILES = (MODEL_FILE, CONFIG_FILE, STATE_FILE)
FOLDER = "checkpoints"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: of the run.
        keep: how many of the best stay; the newest two stay besides.
    """

    def __init__(self, run_dir: Path, keep: int = 1) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / FOLDER
        self.keep = keep

    def steps(self) -> list[int]:
        """Of the complete checkpoints, oldest first."""
        names = (p.name for p in self.folder.glob("step-*") if p.is_dir())
        return sorted(int(n[5:]) for n in names if n[5:].isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        model: nn.Module,
        weights: dict[str, Tensor],
        state: dict[str, Any],
        preprocessing: dict[str, Any],
        label_names: list[str],
    ) -> None:
        """Write a checkpoint and point `last` to it.

        Args:
            model: says its architecture. weights: its state_dict.
            state: tensors, numbers, strings and containers of them; read back with weights_only.
            preprocessing: of the evaluation, in timm's words.
            label_names: of the classifier's outputs.
        Raises:
            UserError: where it cannot be written (a full disk); the checkpoints before it stay.
        """
        path = self.path(step)
        fresh = path.with_name(f"{path.name}.new")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            # timm's save_for_hf takes no weights with their channels last in memory.
            weights = {name: x.contiguous() for name, x in weights.items()}
            save_file(weights, fresh / MODEL_FILE, metadata={"format": "pt"})
            save_config_for_hf(
                model, str(fresh / CONFIG_FILE), model_config={"label_names": label_names},
                data_config=preprocessing,
            )  # fmt: skip
            with (fresh / STATE_FILE).open("wb") as file:
                torch.save(state, file)
            files = {name: _describe(fresh / name) for name in FILES}
            manifest = {"format": FORMAT, "step": step, "files": files}
            (fresh / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
            for name in (*FILES, MANIFEST_FILE):
                _sync(fresh / name)
            _sync(fresh)
            if path.exists():  # one that did not verify
                shutil.rmtree(path)
            fresh.rename(path)
            _sync(self.folder)
            verify(path)
            self.point("last", step)
        except (OSError, RuntimeError, ValueError, SafetensorError, shutil.Error) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if isinstance(error, RuntimeError) and worker_died(error):
                raise  # torch tells of it at any line
            reason = one_line(_cause(error))
            raise UserError(f"cannot write checkpoint {path}: {reason}") from error

    def point(self, name: str, step: int) -> None:
        """Make RUN/`name` the checkpoint of that step, where it is still there."""
        if not self.path(step).is_dir():
            return
        link, target = self.run_dir / name, Path(FOLDER) / self.path(step).name
        fresh = link.with_name(f"{name}.new")
        if fresh.is_dir() and not fresh.is_symlink():
            shutil.rmtree(fresh)
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(target, target_is_directory=True)
            fresh.replace(link)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise UserError(f"cannot write {link}: {one_line(error)}") from error
            if link.is_symlink():
                link.unlink()
            elif link.is_dir():
                shutil.rmtree(link)
            shutil.copytree(self.path(step), link)

    def prune(self, scores: dict[int, float]) -> None:
        """Drop what is neither of the newest two nor of the best.

        Args:
            scores: top-1 by step, of those evaluated; the first of equals is the best.
        """
        steps = self.steps()
        ranked = sorted((s for s in scores if s in steps), key=lambda s: (-scores[s], s))
        for step in set(steps) - set(steps[-2:]) - set(ranked[: self.keep]):
            gone = self.path(step).with_name(f"{self.path(step).name}.old")
            shutil.rmtree(gone, ignore_errors=True)
            try:
                self.path(step).rename(gone)
            except OSError as error:
                raise UserError(f"cannot drop {self.path(step)}: {one_line(error)}") from error
            shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Drop what a killed run was writing or removing."""
        for left in [*self.folder.glob("step-*.new"), *self.folder.glob("step-*.old")]:
            shutil.rmtree(left, ignore_errors=True)

    def set_aside_behind(self, step: int) -> None:
        """Rename the checkpoints of later steps, which were damaged: they count no more."""
        for later in self.steps():
            if later > step:
                path = self.path(later).with_name(f"{self.path(later).name}.damaged")
                shutil.rmtree(path, ignore_errors=True)
                self.path(later).rename(path)

    def newest(self, report: Callable[[str], object]) -> int | None:
        """The last step whose files are as they were written; None where there is no checkpoint.

        Args:
            report: called with a line for each one that is not.
        Raises:
            UserError: where there are some and none verifies.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                verify(self.path(step))
                load_state(self.path(step))
                return step
            except UserError as error:
                report(f"{error.line}; the checkpoint before it is used")
        if steps:
            raise UserError(f"none of the {len(steps)} checkpoints in {self.folder} can be used")
        return None


def _cause(error: BaseException) -> BaseException:
    """torch tells of its own confusion where a file could not be written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _sync(path: Path) -> None:
    """To the disk: of a folder, its names."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def verify(folder: Path) -> None:
    """Raises UserError where a file is missing or is not what was written."""
    try:
        folder = folder.resolve()  # of a link
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
        if folder.name != f"step-{manifest['step']:08d}":
            raise UserError(f"{folder} holds the checkpoint of step {manifest['step']}")
        if version != FORMAT:
            raise UserError(f"{folder} has format {version!r}, {FORMAT} is read")
        for name in FILES:
            found, written = _describe(folder / name), files[name]
            for key in ("size", "sha256"):
                if found[key] != written[key]:
                    raise UserError(f"{folder / name} is damaged: {key} {found[key]}, written was "
                                    f"{written[key]}")  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {one_line(error)}") from error


def load_state(folder: Path) -> dict[str, Any]:
    """The training state, tensors on the CPU; code in it is never run."""
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes of the reader
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read {path}: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no training state of this program")
    return state


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Of the model in the folder."""
    try:
        return load_file(folder / MODEL_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / MODEL_FILE}: {one_line(error)}") from error
