"""From a checkpoint to a proven file, and what is written beside it."""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metala_vision._version import __version__
from metala_vision.errors import UserError, one_line
from metala_vision.evaluate import find_images, load_model
from metala_vision.files import evenly_spread, replacing
from metala_vision.labels import labels_of
from metala_vision.layers.scan import ANY_SIZE
from metala_vision.models.backbone import Backbone
from metala_vision.visualize.command import image_files, read_images
from metala_vision.weights.check import sha256_of

from .formats import DTYPES, Deployed, dynamic_shapes, write
from .proof import Case, Proof, noise, prove
from .wanted import Export, sidecar_of

BATCHES = (1, 2, 5)  # of the noise, where the batch is free
LEAST_TOKENS = 32  # of a graph for any size: fewer are one chunk, another graph
VERSIONS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")


def export_checkpoint(wanted: Export) -> tuple[Proof, dict[str, Any]]:
    """Write wanted.out and its sidecar, both or neither.

    Returns:
        The proof, and what the sidecar says.
    Raises:
        UserError: for what the user can mend, and where the file is not the model.
    """
    model, size = load(wanted)
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {}))
    patch = check_dynamic(wanted, model, size)
    classes = int(getattr(model, "num_classes", 0)) > 0
    if wanted.softmax and not classes:
        raise UserError(f"--softmax: {wanted.checkpoint} has no classes")
    output = "features" if not classes else "probabilities" if wanted.softmax else "logits"
    cases = make_cases(wanted, cfg, size, patch)
    exported, _ = load(wanted, exportable=True)
    exported = exported.to(DTYPES[wanted.dtype])
    mean, std = (tuple(map(float, cfg[key])) if wanted.normalize else None
                 for key in ("mean", "std"))  # fmt: skip
    graph = Deployed(exported, DTYPES[wanted.dtype], mean, std, wanted.softmax).eval()
    example = noise((wanted.batch_size or 2, *size), 0, wanted.normalize)
    facts = describe(wanted, model, cfg, size, patch, output)
    kind = wanted.format
    with replacing(sidecar_of(wanted.out)) as beside, replacing(wanted.out) as fresh:
        shapes = dynamic_shapes(wanted.dynamic, patch)
        opset = write(
            kind, graph.requires_grad_(False), example, shapes, output, fresh, facts, wanted.opset
        )
        proof = prove(kind, fresh, model, cases, wanted.dtype, wanted.softmax, classes)
        file = {"name": wanted.out.name, "bytes": fresh.stat().st_size, "sha256": sha256_of(fresh)}
        facts |= {"file": file, **({"opset": opset} if opset else {}), "proof": asdict(proof)}
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        beside.write_text(f"{text}\n", encoding="utf-8")
    return proof, facts


def load(wanted: Export, **kwargs: Any) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model, and the size (C, height, width) of its images.

    Models that no size is built into, such as convolutional ones, take no img_size.
    """
    if wanted.img_size is None:
        model = load_model(wanted.checkpoint, **wanted.model_kwargs, **kwargs)
    else:
        sized = {"img_size": wanted.img_size, **wanted.model_kwargs}
        try:
            model = load_model(wanted.checkpoint, **sized, **kwargs)
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, TypeError) or "'img_size'" not in str(cause):
                raise
            model = load_model(wanted.checkpoint, **wanted.model_kwargs, **kwargs)
    cfg: Any = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    height, width = wanted.img_size or (height, width)
    x = torch.zeros(1, channels, height, width)
    try:
        with torch.no_grad():
            y = model(x)
    except Exception as error:  # a model's own words about a size
        raise UserError(
            f"{wanted.checkpoint} does not take {height} x {width} px: {one_line(error)[:300]}"
        ) from error
    if not isinstance(y, Tensor) or y.dim() != 2:
        raise UserError(f"{wanted.checkpoint} does not answer with [B, classes] or [B, features]")
    return model.requires_grad_(False), (channels, height, width)


def check_dynamic(
    wanted: Export, model: nn.Module, size: tuple[int, int, int]
) -> tuple[int, int]:  # fmt: skip
    """The patch (height, width), of a model for any size; (1, 1) where the size is fixed."""
    if wanted.dynamic != "size":
        return 1, 1
    if not isinstance(model, Backbone):
        raise UserError(
            f"--dynamic size is for models of this package, {wanted.checkpoint} is none; "
            "--img-size takes another size"
        )
    orders = {name for module in model.modules() for name in getattr(module, "scans", ())}
    if fixed := sorted(orders - set(ANY_SIZE)):
        raise UserError(
            f"--dynamic size: the scan {fixed[0]} of {wanted.checkpoint} is exported at one size; "
            f"{', '.join(ANY_SIZE)} take any"
        )
    patch: Any = model.patch_h, model.patch_w  # torch types attributes as tensors
    grid = size[1] // patch[0], size[2] // patch[1]
    if grid[0] * grid[1] < LEAST_TOKENS or min(grid) < 2:
        raise UserError(
            f"--dynamic size needs {LEAST_TOKENS} patches and two a side, {size[1]} x {size[2]} px "
            f"have {grid[0]} x {grid[1]}; a larger --img-size is where it begins"
        )
    return int(patch[0]), int(patch[1])


def make_cases(
    wanted: Export, cfg: dict[str, Any], size: tuple[int, int, int], patch: tuple[int, int]
) -> list[Case]:
    """Noise of several batches and sizes, and the user's images."""
    channels, height, width = size
    mean, std = (torch.tensor(cfg[key], dtype=torch.float64).view(-1, 1, 1)
                 for key in ("mean", "std"))  # fmt: skip

    def case(images: Tensor, real: bool) -> Case:
        inside = ((images.double() - mean) / std).float() if wanted.normalize else images
        return Case(images, inside, real)

    fixed = wanted.batch_size
    shapes = [(fixed, *size)] * 3 if fixed else [(batch, *size) for batch in BATCHES]
    if wanted.dynamic == "size":
        smallest = 2 * patch[0], LEAST_TOKENS // 2 * patch[1]
        for h, w in ((height + patch[0], width), (height, width + 3 * patch[1]),
                     (2 * height, width), smallest):  # fmt: skip
            shapes.append((len(shapes) % 2 + 1, channels, h, w))
    cases = [case(noise(shape, i, wanted.normalize), False) for i, shape in enumerate(shapes)]
    if (files := wanted_images(wanted)) is not None:
        images = torch.stack(read_images(files, {**cfg, "input_size": size}))
        if wanted.normalize:
            images = (images * std + mean).clamp(0, 1).float()
        batch = fixed or 8
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            if fixed:  # the last one again, for a whole batch
                part = torch.cat([part, part[-1:].expand(fixed - len(part), -1, -1, -1)])
            cases.append(case(part, True))
    return cases


def wanted_images(wanted: Export) -> list[Path] | None:
    """Up to max_images, evenly spread over all."""
    if wanted.data_dir is not None:
        files = [Path(path) for path, _ in find_images(wanted.data_dir, None).samples]
    elif wanted.images:
        files = image_files(wanted.images)
    else:
        return None
    return evenly_spread(files, wanted.max_images)


def describe(
    wanted: Export, model: nn.Module, cfg: dict[str, Any], size: tuple[int, int, int],
    patch: tuple[int, int], output: str,
) -> dict[str, Any]:  # fmt: skip
    """What a user of the file needs to know; goes into the file and beside it."""
    names = cfg.get("label_names")
    versions = {"metala-vision": __version__, "python": platform.python_version()}
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    axes: list[int | str] = [wanted.batch_size or "batch", *size]
    if wanted.dynamic == "size":
        axes[2:] = [f"height, a multiple of {patch[0]}", f"width, a multiple of {patch[1]}"]
    return {
        "format": wanted.format,
        "model": str(cfg.get("architecture", wanted.checkpoint)),
        "checkpoint": Path(wanted.checkpoint).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "input": {
            "name": "images", "shape": axes, "dtype": "float32", "size": list(size),
            "range": "0 to 1" if wanted.normalize else "(0 to 1 - mean) / std",
            "mean": list(cfg["mean"]), "std": list(cfg["std"]),
            "interpolation": cfg["interpolation"], "crop_pct": cfg["crop_pct"],
            "crop_mode": cfg.get("crop_mode", "center"),
        },
        "output": {"name": output, "dtype": "float32"},
        "normalization": "inside" if wanted.normalize else "outside",
        "dtype": wanted.dtype,
        "dynamic": wanted.dynamic,
        "class_names": None if names is None else labels_of(model, "")[0],
        "class_descriptions": cfg.get("label_descriptions"),
        "versions": versions,
    }  # fmt: skip
