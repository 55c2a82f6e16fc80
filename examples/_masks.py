"""Your images and masks: PNG files of class numbers, as Oxford-IIIT Pets and Pascal VOC have them.

B batch, S side of what the model sees in pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _scenes import draws
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from metala_vision.errors import UserError, one_line
from metala_vision.sources import IMG_EXTENSIONS, convert, decode

IGNORED = 255
NUMBERS = ("P", "L", "1")  # modes whose pixels are numbers; VOC's colours are a palette


class MaskFolders:
    """Pairs of image [3, S, S] in 0 to 1 and mask [S, S] of classes, 255 where nothing is known.

    A mask belongs to the image of the same name; images without one are left out. Training takes
    random crops and flips, the same of both; held-out images are scaled to the square.

    Args:
        images, masks: the folders.
        img_size: S.
        first_class: the number in the files that is class 0.
        val_fraction: of the pairs, held out.
    Raises:
        UserError: for what the user can mend, before any training.
    """

    def __init__(
        self, images: Path, masks: Path, img_size: int, first_class: int, val_fraction: float
    ) -> None:
        self.first_class = first_class
        self.name = str(images.name)
        found = _by_stem(images, IMG_EXTENSIONS)
        wanted = _by_stem(masks, (".png",))
        alone = sorted(wanted.keys() - found.keys())
        if alone:
            raise UserError(f"mask {wanted[alone[0]]} has no image {alone[0]}.* in {images}")
        self.pairs = [(found[stem], wanted[stem]) for stem in sorted(wanted)]
        order = np.random.default_rng(0).permutation(len(self.pairs)).tolist()
        cut = max(1, round(val_fraction * len(order)))
        if cut >= len(order):
            raise UserError(f"{masks} has {len(order)} masks: too few for training and holding out")
        self.parts = {True: sorted(order[:cut]), False: sorted(order[cut:])}
        pixels = np.zeros(IGNORED + 1, dtype=np.int64)
        largest = 0
        for held_out, part in self.parts.items():
            for index in part:
                counts = np.bincount(self._mask(index).ravel(), minlength=IGNORED + 1)
                largest = max(largest, *np.flatnonzero(counts[:IGNORED]), 0)
                pixels += counts * (not held_out)
        if largest == 0:
            raise UserError(f"the masks in {masks} hold one class; two or more are needed")
        self.classes = tuple(f"class {i}" for i in range(largest + 1))
        self.pixels = pixels[: largest + 1]  # of each class, in training
        size = (img_size, img_size)
        both = [v2.ToDtype(torch.float32, scale=True)]
        self.crop = v2.Compose([
            v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True),
            v2.RandomHorizontalFlip(), *both,
        ])  # fmt: skip
        self.whole = v2.Compose([v2.Resize(size, antialias=True), *both])

    def fixed(self, seed: int) -> None:
        """No training image is the same twice."""

    def training(self, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches [B, 3, S, S] and [B, S, S] without end; the seed decides crops and flips."""
        part = self.parts[False]
        for step, chosen in enumerate(draws(len(part), seed, batch_size)):
            with torch.random.fork_rng(devices=[]):  # from which torchvision takes its numbers
                torch.manual_seed(seed * 1_000_003 + step)
                batch = [self._pair(part[i], self.crop) for i in chosen.tolist()]
            yield _stacked(batch)

    def held_out(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images, scaled."""
        part = self.parts[True]
        for start in range(0, len(part), batch_size):
            yield _stacked([self._pair(i, self.whole) for i in part[start : start + batch_size]])

    def _pair(self, index: int, transform: v2.Transform) -> tuple[Tensor, Tensor]:
        path, _ = self.pairs[index]
        image = np.array(convert(decode(path, str(path)), "RGB"))
        mask = tv_tensors.Mask(torch.from_numpy(self._mask(index)))
        return transform(tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), mask)

    def _mask(self, index: int) -> np.ndarray:
        """Classes [height, width] of a file, as large as its image."""
        image, path = self.pairs[index]
        try:
            with Image.open(image) as opened:
                size = opened.size
            with Image.open(path) as opened:
                mode, numbers = opened.mode, np.array(opened)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"cannot read {path} and its image: {one_line(error)}") from error
        if mode not in NUMBERS:
            raise UserError(
                f"mask {path} holds colours or wide numbers ({mode}); class numbers are wanted, as "
                "8-bit grey or palette PNG"
            )
        if size != numbers.shape[::-1]:
            raise UserError(
                f"mask {path} is {numbers.shape[1]}x{numbers.shape[0]}, its image "
                f"{size[0]}x{size[1]}"
            )
        classes = numbers.astype(np.int64)
        known = classes != IGNORED
        if known.any() and classes[known].min() < self.first_class:
            raise UserError(
                f"mask {path} has class {classes[known].min()}, below --first-class "
                f"{self.first_class}"
            )
        classes[known] -= self.first_class
        return classes


def _by_stem(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder with these endings, by name without it."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in endings or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{found[path.stem]} and {path} have the same name; one mask fits both")
        found[path.stem] = path
    if not found:
        raise UserError(f"{folder} holds no files that end in {' '.join(endings)}")
    return found


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*pairs, strict=True)
    return torch.stack(images).as_subclass(Tensor), torch.stack(masks).as_subclass(Tensor)
