"""Images a second of the training loader beside timm's create_loader, on the same folder.

    python benchmarks/loader.py DIR [--workers W] [--batch-size B] [--repeats R] [--img-size S]

DIR holds train/ with one folder per class, or class folders itself. Both decode, crop, flip, apply
RandAugment and random erasing, and normalise, with the same settings, in the same number of
workers; whole epochs in turn in one process, medians. timm without its prefetcher, which needs a
GPU. The ratio is the figure to quote.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import command
from timm.data import create_dataset, create_loader

from metala_vision.build import create_model
from metala_vision.config import DataConfig, ModelConfig
from metala_vision.data import create_loaders
from metala_vision.errors import UserError
from metala_vision.sources import FolderSource
from metala_vision.splits import Split


def epoch(draw: Callable[[], Any]) -> float:
    """Images a second."""
    start, images = time.perf_counter(), 0
    for batch, *_ in draw():
        images += len(batch)
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--img-size", type=int, default=224)
    given = parser.parse_args()
    if not given.folder.is_dir():
        raise UserError(f"there is no folder {given.folder}")
    root = given.folder / "train" if (given.folder / "train").is_dir() else given.folder
    data = DataConfig(
        batch_size=given.batch_size, workers=given.workers, auto_augment="rand-m9-mstd0.5-inc1",
        reprob=0.25,
    )  # fmt: skip
    model_config = ModelConfig(img_size=given.img_size)
    source = FolderSource(root)
    indices = range(len(source.targets))
    split = Split(root, source, indices, source, indices)
    model = create_model(model_config, split.num_classes)
    made = create_loaders(data, model_config, model, split, seed=0)
    inputs = made.preprocessing
    other: Any = create_loader(
        create_dataset("", root=str(root), is_training=True),
        input_size=inputs["input_size"], batch_size=given.batch_size, is_training=True,
        use_prefetcher=False, scale=data.scale, ratio=data.ratio, hflip=data.hflip,
        auto_augment=data.auto_augment, re_prob=data.reprob, re_mode="pixel", color_jitter=0.0,
        interpolation=data.interpolation, mean=inputs["mean"], std=inputs["std"],
        num_workers=given.workers, persistent_workers=given.workers > 0,
    )  # fmt: skip
    forms: dict[str, Callable[[], Any]] = {"ours": lambda: made.train, "timm": lambda: other}
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(given.repeats + 1):
        for name, draw in forms.items():
            rate = epoch(draw)
            if repeat:  # the first starts the workers and fills the disk's cache
                rates[name].append(rate)
    ours, timms = (statistics.median(rates[name]) for name in forms)
    print(f"{len(indices):,} images, {given.workers} workers, torch {torch.__version__}")
    print(f"ours {ours:.1f} img/s, timm {timms:.1f} img/s, ratio {ours / timms:.3f}")


if __name__ == "__main__":
    command(main)
