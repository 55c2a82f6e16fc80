"""Batches of images that are kept on the device, augmented there."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from metala_vision.config import DataConfig
from metala_vision.sampling import (
    NOISE,
    REPLACEMENT,
    EpochBatches,
    EvaluationOrder,
    Key,
    stream,
)
from metala_vision.splits import Split

from . import colour, draws
from .kept import Kept, Square, keep
from .resize import resize, resize_weights

NOISE_SIDE = 256  # of the square that erased patches come from


class Augmentation:
    """The training augmentation of a configuration, for batches of bytes.

    Crop, mirroring and jitter are those of the other loader to the last bit, given the same crop,
    factors and order, which are drawn from other numbers. Erased patches are cut from one square of
    noise.

    Args:
        config: of the data. shape: (C, S, S), of the result. mean, std: C of each, or one, where
            the images are. seed: of the run.
    """

    def __init__(
        self, config: DataConfig, shape: tuple[int, int, int], mean: Tensor, std: Tensor, seed: int
    ) -> None:
        self.config, self.size, self.seed = config, shape[-1], seed
        self.mean, self.std = mean, std
        self.noise_side = max(NOISE_SIDE, 2 * self.size)
        self.noise: Tensor | None = None
        if config.reprob:
            numbers = np.random.Generator(np.random.PCG64(stream(seed, NOISE)))
            noise = numbers.standard_normal((shape[0], self.noise_side, self.noise_side))
            self.noise = torch.from_numpy(noise).float().to(mean.device)

    def __call__(self, images: Tensor, epoch: int, places: list[int]) -> Tensor:
        """uint8 [B, C, height, width], at those places of an epoch -> float32 [B, C, S, S]."""
        config, size = self.config, self.size
        numbers = draws.uniform(self.seed, epoch, places)
        full = images.shape[2], images.shape[3]
        box = draws.crops(numbers, full, config.scale, config.ratio)
        columns = [
            box.top, box.left, box.height, box.width, draws.flips(numbers, config.hflip),
            draws.bicubic(numbers, config.interpolation),
        ]  # fmt: skip
        # One copy to the device, which does not wait for it.
        top, left, height, width, flip, cubic = _sent(np.stack(columns), images.device)
        x = resize(
            images,
            resize_weights(top, height, full[0], size, cubic.bool()),
            resize_weights(left, width, full[1], size, cubic.bool(), flip.bool()),
        )
        if config.color_jitter:
            factors, orders = draws.jitters(numbers, config.color_jitter)
            x = colour.jitter(x, _sent(factors, x.device), _sent(orders, x.device))
        x = colour.normalise(x, self.mean, self.std)
        if self.noise is not None:
            box, at = draws.erased(numbers, (size, size), config.reprob, self.noise_side)
            sides = np.stack([box.top, box.left, box.height, box.width])
            top, left, height, width = _sent(sides, x.device)
            at = _sent(at, x.device)
            x = colour.erase(x, (top, left, height, width), self.noise, at)
        return x


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class TrainingBatches:
    """(images, labels, positions of unreadable ones or -1) of each batch, as TrainingData's loader.

    An image that cannot be read is replaced by one drawn for its position.
    """

    def __init__(
        self, kept: Kept, batches: EpochBatches, augmentation: Augmentation, seed: int
    ) -> None:
        self.dataset = kept.images  # has the length of the part
        self.kept, self.batches, self.augmentation = kept, batches, augmentation
        self.replaced: dict[int, int] = {}
        bad = set(kept.unreadable)
        for position in kept.unreadable:
            numbers = np.random.Generator(np.random.PCG64(stream(seed, REPLACEMENT, position)))
            other = position
            while other in bad:
                other = int(numbers.integers(len(kept.images)))
            self.replaced[position] = other

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for keys in self.batches:
            yield self.batch(keys)

    def batch(self, keys: list[Key]) -> tuple[Tensor, Tensor, Tensor]:
        """Of one epoch."""
        device = self.kept.images.device
        positions = [self.replaced.get(key.index, key.index) for key in keys]
        unreadable = [key.index if key.index in self.replaced else -1 for key in keys]
        where = _sent(np.array(positions), device)
        images = self.augmentation(
            self.kept.images[where], keys[0].epoch, [key.place for key in keys]
        )
        return images, self.kept.targets[where], torch.tensor(unreadable)


class EvaluationBatches:
    """(images, labels) in order, as the loader of ImageData: of an image that cannot be read, and
    of the position behind the last, zeros and -1 - position."""

    def __init__(
        self, kept: Kept, order: EvaluationOrder, batch_size: int, mean: Tensor, std: Tensor
    ) -> None:
        self.dataset = kept.images  # has the length of the part
        self.kept, self.batch_size = kept, batch_size
        self.mean, self.std = mean, std
        device = kept.images.device
        self.order = torch.tensor(list(order), device=device)
        self.lost = torch.isin(
            self.order, torch.tensor([*kept.unreadable, len(kept.images)], device=device)
        )

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.kept.images
        parts = (self.order.split(self.batch_size), self.lost.split(self.batch_size))
        for positions, lost in zip(*parts, strict=True):
            where = positions.clamp_max(len(images) - 1)
            x = colour.normalise(images[where], self.mean, self.std)
            x = torch.where(lost[:, None, None, None], 0.0, x)
            yield x, torch.where(lost, -1 - positions, self.kept.targets[where])


def create_batches(
    config: DataConfig, inputs: dict[str, Any], mode: str, split: Split, seed: int,
    batches: EpochBatches, order: EvaluationOrder, device: torch.device, show: bool,
) -> tuple[TrainingBatches, EvaluationBatches]:  # fmt: skip
    """Decode both parts, onto the device.

    Args:
        inputs: preprocessing of the evaluation, whose pixels are those of the other loader.
        mode: "RGB" or "L". show: a progress bar.
    Raises:
        UserError: as keep.
    """
    mean, std = (torch.tensor(inputs[key], device=device) for key in ("mean", "std"))
    evaluated: Any = create_transform(
        inputs["input_size"], interpolation=inputs["interpolation"], crop_pct=inputs["crop_pct"],
        crop_mode=inputs["crop_mode"], normalize=False,
    )  # fmt: skip
    cut = pil_to_tensor if config.on_device_size is None else Square(config.on_device_size)
    train = keep(
        split.train, split.train_indices, mode, cut, device, config.workers, "training", show
    )
    val = keep(
        split.val, split.val_indices, mode, evaluated, device, config.workers, "held-out", show
    )
    augmentation = Augmentation(config, inputs["input_size"], mean, std, seed)
    return (
        TrainingBatches(train, batches, augmentation, seed),
        EvaluationBatches(val, order, config.batch_size, mean, std),
    )
