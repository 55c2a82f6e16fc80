"""Images that are decoded once and kept on the device, as bytes."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    worker_died,
)
from metala_vision.sources import Source, read_image

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
    """Position -> the image [C, height, width] as bytes, or None where it cannot be read."""

    def __init__(
        self, source: Source, indices: Sequence[int], mode: str, transform: Callable
    ) -> None:
        self.source, self.indices = source, indices
        self.mode, self.transform = mode, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor | None:
        try:
            return self.transform(read_image(self.source, self.indices[position], self.mode))
        except UnreadableImage:
            return None


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
    bad = [i for i, image in enumerate(images) if image is None]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        if image is not None:
            by_shape.setdefault(tuple(image.shape), []).append(i)
    return bad, [(own, torch.stack([images[i] for i in own])) for own in by_shape.values()]


class Room:
    """Bytes on the device for the images of a part, 0, taken when the first one's size is known.

    Args:
        count: images. what: the part is called.
    """

    def __init__(self, count: int, device: torch.device, what: str) -> None:
        self.count, self.device, self.what = count, device, what
        self.images: Tensor | None = None
        self.first = ""

    def put(self, places: list[int], batch: Tensor, names: list[str]) -> None:
        """Images [n, C, height, width] at their places.

        Raises:
            UserError: for another size than the first one's, and for too little memory.
        """
        if self.images is None:
            self.images, self.first = self._taken(batch.shape[1:]), names[0]
        if batch.shape[1:] != self.images.shape[1:]:
            raise UserError(
                f"data.on_device: {names[0]} is {_size(batch)}, {self.first} {_size(self.images)}; "
                "on_device_size=SIDE makes all training images one size"
            )
        self.images[torch.tensor(places, device=self.device)] = batch.to(self.device)

    def _taken(self, shape: Sequence[int]) -> Tensor:
        needed, free = self.count * math.prod(shape), free_memory(self.device)
        line = (
            f"data.on_device needs {needed / 2**30:.2f} GiB for {self.count:,} {self.what} images "
            f"of {shape[1]}x{shape[2]}"
        )
        if free is not None and needed > (1 - SPARED) * free:
            raise UserError(
                f"{line}, {free / 2**30:.2f} GiB are free on {self.device}; on_device_size=SIDE "
                "keeps smaller ones"
            )
        try:
            return torch.zeros((self.count, *shape), dtype=torch.uint8, device=self.device)
        except (torch.OutOfMemoryError, MemoryError) as error:  # others took it meanwhile
            raise UserError(f"{line}, which {self.device} does not have free") from error


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
    room, unreadable, first = Room(count, device, what), [], 0
    try:
        with tqdm(total=count, unit="img", desc=f"decoding {what}", leave=False,
                  disable=None if show else True) as bar:  # fmt: skip
            for bad, groups in loader:
                unreadable += [first + i for i in bad]
                for own, batch in groups:
                    places = [first + i for i in own]
                    room.put(places, batch, [source.name(indices[place]) for place in places])
                done = len(bad) + sum(len(own) for own, _ in groups)
                first += done
                bar.update(done)
    except WORKER_ERRORS as error:
        told = worker_died(error)
        if told is None:
            raise
        raise told from error
    if room.images is None:
        raise UserError(f"none of the {count:,} {what} images can be read")
    targets = torch.tensor([source.targets[i] for i in indices], device=device)
    return Kept(room.images, targets, unreadable)


def _size(images: Tensor) -> str:
    """Height x width of [n, C, height, width]."""
    return f"{images.shape[2]}x{images.shape[3]}"


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
