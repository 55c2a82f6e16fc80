"""Whether weights are what their manifest says, and a model takes them."""

from pathlib import Path

import timm
import torch

from metala_vision.errors import UserError, WeightsError, one_line
from metala_vision.models import list_models
from metala_vision.weights import check_entry, check_file, locate
from metala_vision.weights.manifest import MANIFEST_FILE, Entry, read_manifest


def verify_tag(name: str) -> Entry:
    """Of MODEL.TAG: size, sha256, kind of file, and that the model is built with finite weights.

    Raises:
        UserError: with what is wrong.
    """
    found = locate(name)
    if found is None:
        raise WeightsError(f"no weights for {name}")
    _check_model(timm.create_model(name, pretrained=True), name)
    return found.entry


def verify_folder(folder: Path) -> list[tuple[str, Entry]]:
    """The same of every tag in a folder with a manifest, one published alone or many.

    Raises:
        UserError: with what is wrong.
    """
    manifest = read_manifest(folder / MANIFEST_FILE)
    for name, entry in manifest.weights.items():
        path = folder / entry.file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise WeightsError(f"{path} leads out of {folder}")
        check_file(path, entry)
        check_entry(path, entry)
        architecture = name.partition(".")[0]
        if architecture not in list_models():
            raise WeightsError(f"{name}: this version has no model {architecture}")
        overlay = {"file": str(path), "num_classes": entry.num_classes,
                   "input_size": entry.preprocessing.input_size}  # fmt: skip
        try:
            model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay)
        except RuntimeError as error:
            raise WeightsError(f"{name}: {one_line(error)[:300]}") from error
        _check_model(model, name)
    return list(manifest.weights.items())


def _check_model(model: torch.nn.Module, name: str) -> None:
    for key, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise WeightsError(f"{name}: {key} is not finite")


def as_line(name: str, outcome: Entry | UserError) -> str:
    """For people."""
    if isinstance(outcome, UserError):
        return f"{name}: {outcome.line}"
    return f"{name}: ok, {outcome.size:,} bytes, sha256 {outcome.sha256}"
