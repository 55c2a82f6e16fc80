"""Checkpoints: a folder that timm loads, with the state that training needs beside it."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from .errors import UserError, one_line

MODEL_FILE = "model.safetensors"
STATE_FILE = "training_state.pt"


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    state: dict[str, Any],
    preprocessing: dict[str, Any],
    label_names: list[str],
) -> None:
    """Write model.safetensors, config.json and training_state.pt, replacing `folder` as a whole.

    `timm.create_model("local-dir:FOLDER")` loads the result. A half-written checkpoint never
    carries the name: files go to a folder beside it, which is then renamed.

    Args:
        state: tensors, numbers, strings and containers of them; read back with weights_only.
        preprocessing: of the evaluation, in timm's words.
        label_names: of the classifier's outputs.
    Raises:
        UserError: where it cannot be written (a full disk); the checkpoint before it is kept.
    """
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        # timm's save_for_hf takes no weights with their channels last in memory.
        weights = {name: x.contiguous() for name, x in model.state_dict().items()}
        save_file(weights, fresh / MODEL_FILE, metadata={"format": "pt"})
        save_config_for_hf(
            model,
            str(fresh / "config.json"),
            model_config={"label_names": label_names},
            data_config=preprocessing,
        )
        torch.save(state, fresh / STATE_FILE)
        _replace(fresh, folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"cannot write checkpoint {folder}: {one_line(error)}") from error


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Make `folder` a copy of `source`, replaced as a whole."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        shutil.copytree(source, fresh)
        _replace(fresh, folder)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"cannot write checkpoint {folder}: {one_line(error)}") from error


def _replace(fresh: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:  # Ctrl-C too: the name must not stay without a checkpoint
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
