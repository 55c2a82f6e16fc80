"""Images that are decoded once and kept on the device, as bytes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import (
    InterpolationMode,
    center_crop,
    pil_to_tensor,
    resize,
)
from tqdm import tqdm

from metala_vision.errors import (
    WORKER_ERRORS,
    UnreadableImage,
    UserError,
    one_line,
    worker_died,
)
from metala_vision.sources import Source, convert

DECODED = 256  # images of a batch on its way to the device
SPARED = 0.1  # of the free memory, for model and activations at the very least


@dataclass(frozen=True)
class Kept:
    """Images of one part.

    images: uint8 [n, C, height, width]; those that cannot be read are 0.
    targets: [n], on the same device.
    unreadable: their positions.
    """

    images: Tensor
    targets: Tensor
    unreadable: list[int]


class Decoded(Dataset):
    """Position -> the image [C, height, width] as bytes, or the line of why it cannot be read."""

    def __init__(
        self, source: Source, indices: Sequence[int], mode: str, transform: Callable
    ) -> None:
        self.source, self.indices = source, indices
        self.mode, self.transform = mode, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor | str:
        index = self.indices[position]
        try:
            image = convert(self.source.image(index), self.mode)
        except UnreadableImage as error:
            return error.line
        except ValueError as error:  # of a rare kind of pixel
            return f"cannot read image {self.source.name(index)}: {one_line(error)}"
        return self.transform(image)


class Square:
    """Resizes the shorter side of an image and takes the centre, as bytes [C, side, side]."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Tensor:
        given: Any = image  # torchvision types tensors alone
        smaller: Any = resize(given, [self.side], InterpolationMode.BICUBIC)
        cut: Any = center_crop(smaller, [self.side, self.side])
        return pil_to_tensor(cut)


def together(images: list[Any]) -> tuple[list[int], list[tuple[list[int], Tensor]]]:
    """Of a batch of Decoded the places of the unreadable, and of each size places and images."""
    bad = [i for i, image in enumerate(images) if isinstance(image, str)]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        if not isinstance(image, str):
            by_shape.setdefault(tuple(image.shape), []).append(i)
    return bad, [(own, torch.stack([images[i] for i in own])) for own in by_shape.values()]


def keep(
    source: Source, indices: Sequence[int], mode: str, transform: Callable, device: torch.device,
    workers: int, what: str, show: bool = False,
) -> Kept:  # fmt: skip
    """Decode images and put them on the device.

    Args:
        source, indices: of the part. mode: "RGB" or "L".
        transform: from an image to bytes [C, height, width].
        workers: processes that decode.
        what: the part is called. show: a progress bar, on a terminal.
    Raises:
        UserError: for images of several sizes, for too little memory, and where none can be read.
    """
    loader = DataLoader(
        Decoded(source, indices, mode, transform), DECODED, num_workers=workers,
        collate_fn=together, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    count = len(indices)
    images: Tensor | None = None
    unreadable: list[int] = []
    try:
        with tqdm(total=count, unit="img", desc=f"decoding {what}", leave=False,
                  disable=None if show else True) as bar:  # fmt: skip
            for number, (bad, groups) in enumerate(loader):
                first = number * DECODED
                unreadable += [first + i for i in bad]
                for own, batch in groups:
                    if images is None:
                        images = _room(count, batch.shape[1:], device, what)
                    if batch.shape[1:] != images.shape[1:]:
                        raise UserError(
                            f"data.on_device: {source.name(indices[first + own[0]])} has "
                            f"{_size(batch)} pixels, others {_size(images)}; on_device_size=SIDE "
                            "makes them one size"
                        )
                    images[torch.tensor(own, device=device) + first] = batch.to(device)
                bar.update(min(DECODED, count - first))
    except WORKER_ERRORS as error:
        told = worker_died(error)
        if told is None:
            raise
        raise told from error
    if images is None:
        raise UserError(f"none of the {count:,} {what} images can be read")
    targets = torch.tensor([source.targets[i] for i in indices], device=device)
    return Kept(images, targets, unreadable)


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}x{images.shape[3]}"


def _room(count: int, shape: Sequence[int], device: torch.device, what: str) -> Tensor:
    """Bytes for the images of a part, 0.

    Raises:
        UserError: where the device has too little memory.
    """
    needed, free = count * int(np.prod(shape)), free_memory(device)
    if free is not None and needed > (1 - SPARED) * free:
        raise UserError(
            f"data.on_device needs {needed / 2**30:.1f} GiB for {count:,} {what} images of "
            f"{shape[1]}x{shape[2]}, {free / 2**30:.1f} GiB are free on {device}; a smaller "
            "on_device_size needs less"
        )
    return torch.zeros((count, *shape), dtype=torch.uint8, device=device)


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
