"""From images to batches: datasets and loaders. timm builds the transforms."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .config import DataConfig, ModelConfig
from .errors import OwnError, UnreadableImage, UserError, one_line
from .on_device import create_batches
from .processes import SIGNALS
from .sampling import (
    AUGMENTATION,
    REPLACEMENT,
    EpochBatches,
    EvaluationOrder,
    Key,
    Loader,
    seeded,
    stream,
)
from .sources import Source, read_image
from .splits import Split

GRACE = 60  # seconds that a worker outlives a signal
REPLACEMENTS = 20  # tries for one that can


class ImageData(Dataset):
    """Some of a source's images, in order: (transformed image, label).

    One that cannot be read is zeros, and its label -1 - position; so is the position behind the
    last, which EvaluationOrder fills up with.

    Args:
        source: of the images. indices: those taken.
        mode: "RGB" or "L". transform: of an image to [C, height, width].
        size: (C, height, width).
    """

    def __init__(
        self, source: Source, indices: Sequence[int], mode: str, transform: Callable,
        size: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.source = source
        self.indices = indices
        self.mode = mode
        self.transform = transform
        self.size = size

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, position: int) -> tuple[Tensor, int]:
        """Raises UnreadableImage."""
        index = self.indices[position]
        image = read_image(self.source, index, self.mode)
        return self.transform(image), self.source.targets[index]

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        try:
            if position < len(self):
                return self.sample(position)
        except UnreadableImage:
            pass
        return torch.zeros(self.size), -1 - position


class TrainingData(ImageData):
    """The same, indexed by Key and augmented from (seed, epoch, place): (image, label, unreadable).

    An image that cannot be read is replaced by one drawn from the same numbers, and its position is
    the third number; otherwise that is -1.

    Args:
        seed: of the run; the others as ImageData.
    """

    def __init__(self, *of_data: Any, seed: int) -> None:
        super().__init__(*of_data)
        self.seed = seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        where = (key.epoch, key.place)
        draws = np.random.Generator(np.random.PCG64(stream(self.seed, REPLACEMENT, *where)))
        position, unreadable, line = key.index, -1, ""
        for _ in range(REPLACEMENTS):
            try:
                with seeded(stream(self.seed, AUGMENTATION, *where)):
                    image, target = self.sample(position)
                return image, target, unreadable
            except UnreadableImage as error:
                unreadable, line = key.index, error.line
            position = int(draws.integers(len(self)))
        raise OwnError(f"{REPLACEMENTS} images one after the other: {line}")


def outlive_signals(worker: int) -> None:
    """A launcher signals all processes of a run: a worker goes on until the training is saved."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: signal.alarm(GRACE))


class Unreadable:
    """Images of one part that could not be read, each reported once, up to the share accepted.

    Args:
        source, indices: of the part. what: "training" or "held-out".
        accepted: data.max_unreadable.
        report: called with the line that names an image.
    """

    def __init__(
        self, source: Source, indices: Sequence[int], what: str, accepted: float,
        report: Callable[[str], object],
    ) -> None:  # fmt: skip
        self.source, self.indices, self.what = source, indices, what
        self.accepted, self.report = accepted, report
        self.positions: set[int] = set()

    def __call__(self, positions: Sequence[int]) -> None:
        """Raises UserError where there are too many."""
        line = ""
        for position in positions:
            if position in self.positions or position >= len(self.indices):
                continue
            self.positions.add(position)
            index = self.indices[position]
            try:
                self.source.image(index)
                line = f"{self.source.name(index)} could be read at the second try alone"
            except UnreadableImage as error:
                line = error.line
            self.report(line)
        count, images = len(self.positions), len(self.indices)
        if line and count > self.accepted * images:
            raise UserError(
                f"{line}; {count} of {images:,} {self.what} images cannot be read, more than "
                f"data.max_unreadable={self.accepted}"
            )


@dataclass
class Loaders:
    """What the training loop draws from. `train` is shuffled by `batches`, which wants to know the
    epoch; `val` is in order and complete. Over several processes, each has its part of both.

    preprocessing: of the evaluation, in timm's words; saved with the weights.
    unreadable: positions in the "training" and the "held-out" part, where they are known ahead.
    """

    train: Loader
    batches: EpochBatches
    val: Loader
    preprocessing: dict[str, Any]
    unreadable: dict[str, list[int]] = field(default_factory=dict)

    def close(self) -> None:
        """End the workers now, not when the last reference goes."""
        for loader in (self.train, self.val):
            draws: Any = getattr(loader, "_iterator", None)  # of persistent workers
            if draws is not None:
                draws._shutdown_workers()


def preprocessing_of(
    config: DataConfig, model_config: ModelConfig, model: nn.Module
) -> dict[str, Any]:
    """What evaluation does to an image, in timm's words; what is not configured is the model's own.

    Raises:
        UserError: for a mean or std of another number of channels.
    """
    in_chans = model_config.in_chans
    for name in ("mean", "std"):
        given = getattr(config, name)
        if given is not None and len(given) not in (1, in_chans):
            raise UserError(
                f"data.{name} has {len(given)} values; 1 or in_chans={in_chans} are accepted"
            )
    wanted = {
        "input_size": None,
        "crop_pct": config.crop_pct,
        "mean": config.mean,
        "std": config.std,
        "in_chans": in_chans,
    }
    inputs = resolve_data_config(wanted, model=model)
    size = model_config.img_size or inputs["input_size"][-1]
    return {
        "input_size": (in_chans, size, size),
        "mean": inputs["mean"][:in_chans],
        "std": inputs["std"][:in_chans],
        **{key: inputs[key] for key in ("interpolation", "crop_pct", "crop_mode")},
    }


def create_loaders(
    config: DataConfig,
    model_config: ModelConfig,
    model: nn.Module,
    split: Split,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
) -> Loaders:
    """Transforms and loaders for the model's input size and normalisation.

    Args:
        rank, world: this process and the number of processes.
        device: where images are kept with config.on_device; None is the CPU.
    """
    if len(split.train_indices) < world:
        raise UserError(f"{len(split.train_indices)} training images for {world} processes")
    mode = "RGB" if model_config.in_chans == 3 else "L"
    inputs = preprocessing_of(config, model_config, model)
    batches = EpochBatches(
        len(split.train_indices), config.batch_size, seed, config.aug_repeats, rank, world
    )
    order = EvaluationOrder(len(split.val_indices), rank, world)
    if config.on_device:
        on_device = device or torch.device("cpu")
        train, val = create_batches(
            config, inputs, mode, split, seed, batches, order, on_device, show=rank == 0
        )
        found = {"training": train.kept.unreadable, "held-out": val.kept.unreadable}
        return Loaders(train, batches, val, inputs, found)
    train_transform, val_transform = create_transforms(config, inputs)
    common = {
        "num_workers": config.workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": config.workers > 0,
        "worker_init_fn": outlive_signals,
    }
    # A generator of its own: to start an iterator would draw from the global one.
    train = DataLoader(
        TrainingData(
            split.train, split.train_indices, mode, train_transform, inputs["input_size"], seed=seed
        ),
        batch_sampler=batches,
        generator=torch.Generator().manual_seed(seed),
        **common,
    )
    val = DataLoader(
        ImageData(split.val, split.val_indices, mode, val_transform, inputs["input_size"]),
        batch_size=config.batch_size,
        sampler=order,
        generator=torch.Generator().manual_seed(seed),
        **common,
    )
    return Loaders(train, batches, val, inputs)


def create_transforms(config: DataConfig, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Of training and of evaluation, from an image to a normalised [C, height, width].

    Args:
        inputs: see preprocessing_of.
    Raises:
        UserError: for a policy that timm does not know.
    """
    input_size, mean, std = inputs["input_size"], inputs["mean"], inputs["std"]
    try:
        train_transform: Any = create_transform(
            input_size,
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            re_prob=config.reprob,
            re_mode="pixel",
            mean=mean,
            std=std,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"cannot build the augmentation (data.auto_augment={config.auto_augment!r}): "
            f"{one_line(error)}"
        ) from error
    val_transform: Any = create_transform(
        input_size,
        interpolation=inputs["interpolation"],
        crop_pct=inputs["crop_pct"],
        crop_mode=inputs["crop_mode"],
        mean=mean,
        std=std,
    )
    return train_transform, val_transform
