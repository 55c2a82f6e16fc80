"""A folder of weights, as METALA_VISION_WEIGHTS and a repository of the Hub have it."""

import hashlib
from pathlib import Path

import timm
import torch
from safetensors.torch import save

import metala_vision  # noqa: F401  (registers the models)
from metala_vision.weights.manifest import Entry, Manifest, as_json

CLASSES = ("cat", "dog", "owl")


def tensors(architecture="hgrn_nano", seed=0, **kwargs):
    """The state of a model of three classes, in the half precision that a file has."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=len(CLASSES), **kwargs)
    return {name: x.half() for name, x in model.state_dict().items()}


def entry_of(content: bytes, file: str, **changes) -> Entry:
    return Entry(
        file=file, size=len(content), sha256=hashlib.sha256(content).hexdigest(),
        **{
            "dataset": "pets", "recipe": "none", "license": "apache-2.0", "num_classes": 3,
            "label_names": CLASSES, "metrics": {"top1": 50.0, "top5": 90.0, "images": 10},
            "preprocessing": {"input_size": (3, 64, 64), "interpolation": "bilinear",
                              "crop_pct": 0.8, "crop_mode": "center", "mean": (0.1, 0.2, 0.3),
                              "std": (0.4, 0.5, 0.6)},
            **changes,
        },
    )  # fmt: skip


def files_of(*names: str, content: bytes | None = None, seed=0, **changes) -> dict[str, bytes]:
    """The manifest and the files of a base, by path."""
    found, entries = {}, {}
    for number, name in enumerate(names):
        own = content
        if own is None:
            own = save(tensors(name.partition(".")[0], seed + number), {"format": "pt"})
        found[f"/{name}/model.safetensors"] = own
        entries[name] = entry_of(own, f"{name}/model.safetensors", **changes)
    return {"/manifest.json": as_json(Manifest(weights=entries)).encode(), **found}


def written(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def repository(files: dict[str, bytes], name: str, namespace="owls") -> dict[str, bytes]:
    """The same weights as the Hub has them."""
    path, content = f"{name}/model.safetensors", files[f"/{name}/model.safetensors"]
    manifest = files["/manifest.json"].replace(path.encode(), b"model.safetensors")
    root = f"/{namespace}/{name}/resolve/main"
    return {f"{root}/manifest.json": manifest, f"{root}/model.safetensors": content}


NAME = "hgrn_nano.own"  # of a model for which nothing ships
FILE = f"/{NAME}/model.safetensors"
FILES = files_of(NAME)
