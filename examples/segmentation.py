"""Semantic segmentation on the maps of a timm backbone (`features_only=True`) and a small head.

Digits on photographs, made on the fly:   python examples/segmentation.py
Beside random weights, as a picture:      python examples/segmentation.py --compare --seeds 0 1 2
                                              --picture segmentation.png --json segmentation.json
Your images and masks (Oxford-IIIT Pets): python examples/segmentation.py --images images
                                              --masks annotations/trimaps --first-class 1
Every weight trained:                     python examples/segmentation.py --unfreeze --steps 500

Prints mean IoU and pixel accuracy on what was held out. Where the backbone is frozen and the images
are a fixed set, their maps are computed once, and training is that of the head alone.

B batch, S side of an image, C width of a map, Gh x Gw the grid of the finest map, K classes.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _masks import IGNORED, MaskFolders
from _scenes import Scenes, draws
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from timm.utils import ParseKwargs
from torch import Tensor, nn

import metala_vision  # noqa: F401  (registers the models)
from metala_vision.errors import UserError, nearest, one_line
from metala_vision.files import replacing, write_text

Data = Scenes | MaskFolders
WIDTH = 64  # of the head
SHOWN = 5  # rows of the picture
PICTURES = (".png", ".pdf", ".svg")


class Segmenter(nn.Module):
    """Images [B, 3, S, S] in 0 to 1 -> logits [B, K, S, S].

    Args:
        backbone: of timm, with features_only=True.
        num_classes: K.
        img_size: S.
        frozen: the backbone stays as it is: in evaluation mode, without gradients.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, num_classes: int, img_size: int, frozen: bool) -> None:
        super().__init__()
        self.backbone, self.frozen, self.img_size = backbone, frozen, img_size
        backbone.requires_grad_(not frozen)
        for key in ("mean", "std"):  # what the backbone was trained with
            values = torch.tensor(backbone.pretrained_cfg[key]).view(1, 3, 1, 1)
            self.register_buffer(key, values, persistent=False)
        self.project = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, WIDTH // 2, 1))
            for channels in backbone.feature_info.channels()
        )
        # Each token answers for a few pixels a side: finer than the grid.
        finer = max(1, min(4, min(backbone.feature_info.reduction()) // 2))
        self.fuse = nn.Sequential(
            nn.Conv2d(WIDTH // 2 * len(self.project), WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.GELU(),
            nn.Conv2d(WIDTH, num_classes * finer**2, 1),
            nn.PixelShuffle(finer),
        )

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's maps, each [B, C, its grid]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone((images - self.mean) / self.std)
        widths = self.backbone.feature_info.channels()  # Swin's stand last
        return [
            m if m.shape[1] == C else m.permute(0, 3, 1, 2)
            for m, C in zip(maps, widths, strict=True)
        ]

    def head(self, maps: list[Tensor]) -> Tensor:
        """Maps -> logits [B, K, S, S]."""
        grid = max((tuple(m.shape[2:]) for m in maps), key=math.prod)
        projected = [
            F.interpolate(own(m), grid, mode="bilinear") if m.shape[2:] != grid else own(m)
            for own, m in zip(self.project, maps, strict=True)
        ]
        logits = self.fuse(torch.cat(projected, 1))
        return F.interpolate(logits, (self.img_size, self.img_size), mode="bilinear")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images))

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.project.parameters(), *self.fuse.parameters()]


def build(given: argparse.Namespace, num_classes: int, pretrained: bool, seed: int) -> Segmenter:
    """The model of a seed, which random weights and the head's come from.

    Raises:
        UserError: where timm has no such model with maps, or the images do not fit it.
    """
    if not timm.is_model(given.model):
        near = nearest(given.model, timm.list_models())
        raise UserError(f"--model {given.model} is no timm model{near}")
    torch.manual_seed(seed)
    try:
        backbone = timm.create_model(
            given.model, pretrained=pretrained, features_only=True, **given.model_kwargs
        )
        torch.manual_seed(seed)  # the same head, whatever the backbone took
        model = Segmenter(backbone, num_classes, given.img_size, not given.unfreeze).eval()
        with torch.no_grad():
            model(torch.zeros(1, 3, given.img_size, given.img_size))
    except UserError:
        raise
    except Exception as error:  # whatever a model raises for arguments and sizes that do not fit
        size = f"{given.img_size}x{given.img_size}"
        raise UserError(f"{given.model} for images of {size}: {one_line(error)}") from error
    return model


def train(model: Segmenter, data: Data, given: argparse.Namespace, seed: int) -> None:
    """Cross entropy, AdamW, a short warm-up and a cosine to zero."""
    device = model.mean.device
    groups = [{"params": model.head_parameters(), "lr": given.lr}]
    if not model.frozen:
        groups.append({"params": list(model.backbone.parameters()), "lr": given.backbone_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    warmup = max(1, given.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * (1 + math.cos(math.pi * i / given.steps)) / 2,
    )
    # A rare class counts for more, by the root; else many steps learn nothing but the background.
    pixels = torch.as_tensor(data.pixels).clamp_min(1)
    weight = (pixels.sum() / pixels).sqrt().to(device, torch.float32)
    model.train()
    endless = batches(model, data, given, seed)
    for step, (maps, masks) in zip(range(given.steps), endless, strict=False):
        if (masks == IGNORED).all():
            continue  # a mean over nothing
        loss = F.cross_entropy(model.head(maps), masks.to(device), weight, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, given.steps // 5) == 0:
            print(f"  step {step + 1:5d}  loss {loss.item():.4f}", file=sys.stderr, flush=True)


def batches(
    model: Segmenter, data: Data, given: argparse.Namespace, seed: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The backbone's maps and the masks [B, S, S], without end."""
    device = model.mean.device
    fixed = data.fixed(seed) if model.frozen else None
    if fixed is None:
        for images, masks in data.training(seed, given.batch_size):
            yield model.maps(images.to(device)), masks
        return
    images, masks = fixed
    parts = [model.maps(part.to(device)) for part in images.split(given.batch_size)]
    every = [torch.cat(maps) for maps in zip(*parts, strict=True)]
    for chosen in draws(len(images), seed, given.batch_size):
        yield [maps[chosen] for maps in every], masks[chosen]


@torch.no_grad()
def evaluate(model: Segmenter, data: Data, batch_size: int) -> Tensor:
    """The confusion matrix [K, K] of the held-out pixels: rows the truth, columns the answer."""
    model.eval()
    classes = len(data.classes)
    total = torch.zeros(classes, classes, dtype=torch.long)
    for images, masks in data.held_out(batch_size):
        total += confusion(masks, model(images.to(model.mean.device)).argmax(1).cpu(), classes)
    return total


def confusion(truth: Tensor, answer: Tensor, classes: int) -> Tensor:
    """[K, K] counts of (truth, answer), without the pixels of which nothing is known."""
    known = truth != IGNORED
    pairs = truth[known] * classes + answer[known]
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def scores(matrix: Tensor) -> tuple[float, float, list[float | None]]:
    """Mean IoU and pixel accuracy in percent, and the IoU of each class: None where neither truth
    nor answer has it, which does not count in the mean."""
    right, union = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
    ious = [100 * r / u if u else None for r, u in zip(right.tolist(), union.tolist(), strict=True)]
    there = [iou for iou in ious if iou is not None]
    accuracy = 100 * right.sum().item() / max(1, int(matrix.sum()))
    return sum(there) / max(1, len(there)), accuracy, ious


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = [
        "| backbone | mIoU % | pixel accuracy % | CPU s a training |",
        "|---|---:|---:|---:|",
    ]
    for name, runs in rows.items():
        cells = []
        for key in ("miou", "pixel_accuracy"):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        seconds = statistics.mean(run["cpu_seconds"] for run in runs)
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {seconds:.0f} |")
    return "\n".join(lines)


@torch.no_grad()
def picture(models: dict[str, Segmenter], data: Data, path: Path) -> None:
    """Held-out images, their masks and what each model answers, in one picture."""
    images, masks = next(data.held_out(SHOWN))
    columns: dict[str, Any] = {"image": images.permute(0, 2, 3, 1), "truth": masks}
    for name, model in models.items():
        answer = model.eval()(images.to(model.mean.device)).argmax(1).cpu()
        columns[name] = answer.masked_fill(masks == IGNORED, IGNORED)
    count = len(data.classes)
    colours = ["#20242c", *(colormaps["tab10" if count < 12 else "tab20"](i % 20)
                            for i in range(count - 1))]  # fmt: skip
    cmap = ListedColormap(colours).with_extremes(over="#ffffff")
    side = 1.55  # inches
    size = (side * len(columns) + 0.1, side * len(images) + 0.75)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name.replace(", ", ",\n"), fontsize=10)
        for row, own in enumerate(pictures):
            axis = axes[row, column]
            axis.set_axis_off()
            if own.ndim == 3:
                axis.imshow(own.numpy(), interpolation="nearest")
            else:
                axis.imshow(own.numpy(), cmap=cmap, vmin=0, vmax=count - 1, interpolation="nearest")
    if count < 22:
        handles = [Patch(color=c, label=x) for c, x in zip(colours, data.classes, strict=True)]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=11, fontsize=9, frameon=False,
            handlelength=0.9, handletextpad=0.4, columnspacing=0.9,
        )  # fmt: skip
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as that needs no data.

    Raises:
        UserError: for what they may not be.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\nPrints")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="metala_nano", help="any timm model with maps [metala_nano]")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    add("--unfreeze", action="store_true", help="train the backbone too")
    add("--compare", action="store_true", help="beside the same from random weights")
    add("--seeds", type=int, nargs="+", default=[0], help="[0]")
    add("--steps", type=int, default=1500, help="[1500]")
    add("--batch-size", type=int, default=16, help="[16]")
    add("--img-size", type=int, default=64, help="side in pixels [64]")
    add("--lr", type=float, default=6e-3, help="of the head [0.006]")
    add("--backbone-lr", type=float, default=1e-3, help="with --unfreeze [0.001]")
    add("--scenes", type=int, default=3000, help="to train on [3000]")
    add("--held-out", type=int, default=300, help="scenes held out [300]")
    add("--images", type=Path, metavar="DIR", help="your images, instead of scenes of digits")
    add("--masks", type=Path, metavar="DIR", help="PNG files of class numbers; 255 is ignored")
    add("--first-class", type=int, default=0, help="the number that is class 0 [0]")
    add("--val-fraction", type=float, default=0.2, help="of your images, held out [0.2]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--picture", type=Path, metavar="FILE", help=" ".join(PICTURES))
    add("--json", type=Path, metavar="FILE", help="the numbers")
    try:
        given = parser.parse_args(argv)
    except ValueError as error:  # of timm's ParseKwargs
        raise UserError("--model-kwargs takes KEY=VALUE, as in patch_size=4") from error
    for key, least in {"steps": 1, "batch_size": 2, "img_size": 8, "scenes": 2, "held_out": 1,
                       "first_class": 0}.items():  # fmt: skip
        if getattr(given, key) < least:
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} needs {least} or more, got {getattr(given, key)}")
    for key in ("lr", "backbone_lr"):
        if not 0 < getattr(given, key) < math.inf:
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} needs a number above 0, got {getattr(given, key)}")
    if min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        raise UserError(f"--seeds needs different numbers of 0 or more, got {given.seeds}")
    if not 0 < given.val_fraction < 1:
        raise UserError(f"--val-fraction needs more than 0 and less than 1: {given.val_fraction}")
    if given.compare and not given.pretrained:
        raise UserError("--compare is of pretrained with random weights: leave out --no-pretrained")
    if (given.images is None) != (given.masks is None):
        missing = "--masks" if given.masks is None else "--images"
        raise UserError(f"--images and --masks belong together; {missing} is missing")
    if given.picture is not None and given.picture.suffix.lower() not in PICTURES:
        raise UserError(f"--picture must end in one of {' '.join(PICTURES)}, got {given.picture}")
    for flag, path in (("--picture", given.picture), ("--json", given.json)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else f"is in {path.parent}, which does not exist"
            raise UserError(f"{flag} {path} {what}")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {given.device}: {one_line(error)}") from error
    return given


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate every row of the table; the numbers, for JSON."""
    data: Data
    if given.images is None:
        data = Scenes(given.img_size, given.scenes, given.held_out)
    else:
        data = MaskFolders(
            given.images, given.masks, given.img_size, given.first_class, given.val_fraction
        )
    how = "trained" if given.unfreeze else "frozen"
    starts = (True, False) if given.compare else (given.pretrained,)
    names = {start: f"{'pretrained' if start else 'random'}, {how}" for start in starts}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    first: dict[str, Segmenter] = {}  # those of the first seed, for the picture
    for seed in given.seeds:
        for pretrained, name in names.items():
            model = build(given, len(data.classes), pretrained, seed).to(given.device)
            start = time.process_time()  # others may have the processor in between
            train(model, data, given, seed)
            seconds = time.process_time() - start
            miou, accuracy, ious = scores(evaluate(model, data, given.batch_size))
            print(f"{name}, seed {seed}: mIoU {miou:.2f} %, pixel accuracy {accuracy:.2f} %, "
                  f"trained in {seconds:.0f} CPU s", flush=True)  # fmt: skip
            rows[name].append({"seed": seed, "miou": miou, "pixel_accuracy": accuracy,
                               "iou": ious, "cpu_seconds": seconds})  # fmt: skip
            first.setdefault(name, model)
    head = sum(p.numel() for model in list(first.values())[:1] for p in model.head_parameters())
    print(f"\n{given.model} on {data.name}, a head of {head:,} parameters, {given.steps} steps of "
          f"{given.batch_size} at {given.img_size} px\n\n{table(rows)}")  # fmt: skip
    if given.picture is not None:
        picture(first, data, given.picture)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    return {
        "settings": settings, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "classes": data.classes, "head_parameters": head, "rows": rows,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 for what the user can mend."""
    try:
        given = parse(argv)
        numbers = run(given)
        if given.json is not None:
            write_text(given.json, json.dumps(numbers, indent=2) + "\n")
    except UserError as error:
        print(f"segmentation.py: error: {error.line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
