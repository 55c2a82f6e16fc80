"""`metala-vision eval CHECKPOINT`: how good a trained model is, exactly, and how fast."""

import csv
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import models  # noqa: F401  (registers ours with timm)
from .data import ImageData, Unreadable
from .errors import WORKER_ERRORS, UserError, nearest, one_line, worker_died
from .processes import create_accelerator, gathered
from .sampling import EvaluationOrder
from .sources import FolderSource, Source

BINS = 15  # of the calibration error


@dataclass
class Report:
    """Percentages over the images that can be read (top5 is top-n for n < 5 classes); loss is the
    mean cross entropy.

    calibration_error: the mean difference between confidence and accuracy over BINS bins of equal
    width of the confidence, weighted by images, in percent (expected calibration error, arXiv
    1706.04599).
    """

    top1: float
    top5: float
    loss: float
    calibration_error: float
    images: int
    unreadable: int
    img_per_s: float


class ManyLabels:
    """A folder's images with the labels of a file: any of an image's counts as right.

    The file is that of "Are we done with ImageNet?" (arXiv 2006.07159): a JSON list with a list of
    labels for each validation image, in the order of their names; images without one are left out.
    """

    def __init__(self, source: FolderSource, path: Path) -> None:
        try:
            labels = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read labels {path}: {one_line(error)}") from error
        names = sorted(range(len(source.samples)), key=lambda i: Path(source.samples[i][0]).name)
        lists = isinstance(labels, list) and all(
            isinstance(own, list) and all(type(x) is int for x in own) for own in labels
        )
        if not lists or not any(labels):
            raise UserError(f"{path} must be a JSON list with a list of label numbers an image")
        if len(labels) != len(names):
            raise UserError(
                f"{path} has labels for {len(labels)}, the folder has {len(names)} images"
            )
        self.of = {index: set(labels[i]) for i, index in enumerate(names)}


def load_model(checkpoint: str, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """A run's folder, or any timm name with pretrained weights, in evaluation mode.

    Args:
        pretrained: False leaves a timm name the weights it starts with.
    """
    folder = Path(checkpoint)
    name = f"local-dir:{folder}" if folder.is_dir() else checkpoint
    if not folder.is_dir() and ":" not in name and not timm.is_model(name):
        raise UserError(
            f"{checkpoint!r} is no folder with a checkpoint and no timm model"
            f"{nearest(checkpoint, timm.list_models())}"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:4]) or "nothing"
        raise UserError(f"{folder} is no checkpoint: it holds {held}, but no config.json")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except UserError:
        raise
    except Exception as error:  # whatever reading weights may raise
        reason = one_line(error) or type(error).__name__
        raise UserError(f"cannot load {checkpoint}: {reason}") from error


def evaluation_transform(preprocessing: dict[str, Any]) -> tuple[Any, Any]:
    """The input size (C, height, width) of a pretrained_cfg, and timm's transform to it."""
    size = preprocessing["input_size"]
    return size, create_transform(
        size, interpolation=preprocessing["interpolation"], crop_pct=preprocessing["crop_pct"],
        crop_mode=preprocessing.get("crop_mode"), mean=preprocessing["mean"],
        std=preprocessing["std"],
    )  # fmt: skip


def find_images(
    data_dir: Path, classes: list[str] | None, known_classes: bool = False
) -> FolderSource:
    """The val/ of a folder, or the folder itself (as ImageNet-V2's), with the model's labels.

    Folders named 0, 1, 2, ... are label numbers, as in ImageNet-V2. With known_classes, those of
    other classes are left out.
    """
    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist")
    root = next((data_dir / n for n in ("val", "validation") if (data_dir / n).is_dir()), data_dir)
    folders = [p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "."]
    if (
        folders
        and all(name.isdecimal() for name in folders)
        and not set(folders) & set(classes or ())
    ):
        count = len(classes) if classes else max(map(int, folders)) + 1
        return FolderSource(root, [str(i) for i in range(count)], known_classes)
    return FolderSource(root, classes, known_classes)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Of confidences in [0, 1] and whether each was right, as Report has it; 0 to 1."""
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(
        0, bins, confidence.double() - right.double()
    )
    return (gaps.abs().sum() / len(confidence)).item()


@torch.no_grad()
def predict(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, unreadable: Unreadable
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """For every image that can be read, in order and over all processes: label, five guesses,
    confidence and loss, on the CPU; and images a second of the model alone.

    Args:
        loader: of this process's (images, labels), in the order of its sampler.
    """
    parts: list[Tensor] = []
    seconds, images = 0.0, 0
    for batch, target in loader:
        start = time.perf_counter()
        target = target.to(accelerator.device)
        with accelerator.autocast():
            logits = model(batch.to(accelerator.device)).float()
        ranked = logits.softmax(1).topk(min(5, logits.shape[1]), dim=1)
        loss = F.cross_entropy(logits, target.clamp_min(0), reduction="none")
        row = [target[:, None], loss[:, None], ranked.values[:, :1], ranked.indices]
        row = torch.cat([x.cpu().double() for x in row], 1)  # waits for the device
        if len(parts) == 1:  # the first batch warms up, unless it is the only one
            seconds, images = 0.0, 0
        seconds += time.perf_counter() - start
        images += len(row)
        parts.append(row)
    positions = torch.tensor(list(loader.sampler))
    own = torch.cat([positions[:, None].double(), torch.cat(parts)], 1)
    every = gathered(accelerator, [(own, seconds, images)])
    rows = torch.cat([own for own, _, _ in every])
    rows = rows[rows[:, 0].argsort(stable=True), 1:]
    unreadable([-1 - int(label) for label in rows[rows[:, 0] < 0, 0].tolist()])
    rows = rows[rows[:, 0] >= 0]
    if not len(rows):
        raise UserError("none of the images can be read")
    rate = sum(images for *_, images in every) / max(seconds for _, seconds, _ in every)
    return rows[:, 0].long(), rows[:, 3:].long(), rows[:, 2], rows[:, 1], rate


def evaluate_checkpoint(
    checkpoint: str,
    data_dir: Path,
    *,
    labels: Path | None = None,
    batch_size: int = 128,
    workers: int = 4,
    max_unreadable: float = 0.001,
    mixed_precision: str = "no",
    per_class: Path | None = None,
    known_classes: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> Report:
    """Evaluate a checkpoint on a folder of classes.

    Args:
        checkpoint: a folder that a run left, or a timm name.
        data_dir: holds val/, or class folders itself.
        labels: a JSON file of several labels for each image (see ManyLabels).
        per_class: a CSV file to write: class, images, top1, top5.
        known_classes: leave out the images of classes that the model was not trained on.
        model_kwargs: of timm.create_model.
    Raises:
        UserError: for what the user can mend.
    """
    accelerator = create_accelerator(mixed_precision)
    model_kwargs = model_kwargs or {}
    refused = {"in_chans", "img_size", "device", "dtype"} & set(model_kwargs)
    if refused:
        raise UserError(f"--model-kwargs takes no {min(refused)}: images are as in training")
    model = load_model(checkpoint, **model_kwargs)
    preprocessing: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    names = preprocessing.get("label_names")
    classes = None if names is None else list(names)
    if known_classes and classes is None:
        raise UserError(f"--known-classes: {checkpoint} does not name its classes")
    source = find_images(data_dir, classes, known_classes)
    outputs = int(getattr(model, "num_classes", len(source.classes)))
    numbered = source.classes == [str(i) for i in range(len(source.classes))]
    if classes is None and not numbered and len(source.classes) != outputs:
        raise UserError(
            f"{checkpoint} does not name its {outputs} classes, and {data_dir} has "
            f"{len(source.classes)}: which is which is unknown; folders named by label numbers are "
            "taken as such"
        )
    if len(source.classes) > outputs:
        raise UserError(
            f"{data_dir} has {len(source.classes)} classes, {checkpoint} answers with {outputs}"
        )
    many = None if labels is None else ManyLabels(source, labels)
    size, transform = evaluation_transform(preprocessing)
    indices = [i for i in range(len(source.targets)) if many is None or many.of[i]]
    data = ImageData(source, indices, "RGB" if size[0] == 3 else "L", transform, size)
    order = EvaluationOrder(len(data), accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(data, batch_size=batch_size, sampler=order, num_workers=workers)
    say = print if accelerator.is_main_process else lambda line: None
    unreadable = Unreadable(source, indices, "evaluated", max_unreadable, say)
    if source.skipped:
        say(f"left out: {len(source.skipped)} classes that {checkpoint} was not trained on")
    model.to(accelerator.device)
    try:
        target, guesses, confidence, loss, rate = predict(model, loader, accelerator, unreadable)
    except WORKER_ERRORS as error:
        raise worker_died(error) or error from error
    hits = guesses == target[:, None]
    if many is not None:
        kept = [i for n, i in enumerate(indices) if n not in unreadable.positions]
        hits = torch.tensor([
            [int(guess) in many.of[index] for guess in row]
            for index, row in zip(kept, guesses, strict=True)
        ])  # fmt: skip
    if per_class is not None and accelerator.is_main_process:
        write_classes(per_class, source, target, hits)
    top1, top5 = (100 * int(right.sum()) / len(target) for right in (hits[:, 0], hits.any(1)))
    error = 100 * calibration_error(confidence, hits[:, 0])
    count = len(unreadable.positions)
    return Report(top1, top5, loss.mean().item(), error, len(target), count, rate)


def write_classes(path: Path, source: Source, target: Tensor, hits: Tensor) -> None:
    """A line for each class that has images."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["class", "images", "top1", "top5"])
            for label, name in enumerate(source.classes):
                own = hits[target == label]
                if len(own):
                    top1, top5 = (100 * x.double().mean().item() for x in (own[:, 0], own.any(1)))
                    table.writerow([name, len(own), f"{top1:.2f}", f"{top5:.2f}"])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def as_lines(report: Report) -> str:
    """For people; the last line is the top-1."""
    values = dataclasses.asdict(report)
    names = {"top5": "top-5 {:.2f} %", "loss": "loss {:.4f}",
             "calibration_error": "calibration error {:.2f} %", "unreadable": "unreadable {}",
             "img_per_s": "model {:.1f} images a second"}  # fmt: skip
    lines = [text.format(values[key]) for key, text in names.items()]
    return "\n".join([*lines, f"top-1 {report.top1:.2f} % on {report.images:,} images"])
