"""Handwritten digits on photographs, with exact masks: scenes to segment, without a download.

scikit-learn carries both: 1,797 digits of 8x8 pixels (Alpaydin and Kaynak, UCI, CC BY 4.0) and two
photographs, china.jpg by danielbuechele and flower.jpg by vultilion (both CC BY 2.0).

B batch, S side of a scene in pixels, D digits of a scene.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

HELD_OUT_DIGITS = 0.2  # of each class
HELD_OUT_PHOTOGRAPH = 0.4  # of the width, from the left
HELD_OUT_SEED = -1  # no training's: else places and colours would be those of its scenes
LEAST = 96  # side of a background in pixels of the photograph
DIGITS = 5  # tried in each scene; one that would cover an earlier one is left out
SIDE = (0.35, 0.6)  # of a digit, of S
TURN = math.radians(10)  # at most, either way
# Of a digit's darkest ink; a pixel with more is the digit's. Up to twice that it is the outline,
# dark, without which a digit may have the colour of what is behind it.
INK = 0.3


class Scenes:
    """Pairs of image [3, S, S] in 0 to 1 and mask [S, S]: 0 the photograph, 1 to 10 the digits.

    Held-out scenes are of digits and of parts of the photographs that no training scene shows.

    Args:
        img_size: S.
        count: number of training scenes.
        held_out: number of held-out scenes.
    """

    classes = ("background", *map(str, range(10)))
    name = "handwritten digits on photographs"

    def __init__(self, img_size: int, count: int, held_out: int) -> None:
        self.img_size, self.count, self.num_held_out = img_size, count, held_out
        digits: Any = load_digits()
        photographs: Any = load_sample_images().images
        self.digits = torch.tensor(digits.images / 16.0, dtype=torch.float32)
        self.labels = torch.tensor(digits.target)
        shuffled = np.random.default_rng(0).permutation(len(self.labels))
        own = [shuffled[digits.target[shuffled] == label] for label in range(10)]
        cuts = [round(HELD_OUT_DIGITS * len(part)) for part in own]
        self.instances = {
            True: np.concatenate([part[:cut] for part, cut in zip(own, cuts, strict=True)]),
            False: np.concatenate([part[cut:] for part, cut in zip(own, cuts, strict=True)]),
        }
        pixels = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in photographs]
        cut = round(HELD_OUT_PHOTOGRAPH * pixels[0].shape[2])
        self.regions = {
            True: [photo[:, :, :cut] for photo in pixels],
            False: [photo[:, :, cut:] for photo in pixels],
        }

        # Of each class in training, counted on a few scenes.
        self.pixels = self._many(False, 100, 0)[1].flatten().bincount(minlength=11).numpy()

    def fixed(self, seed: int) -> tuple[Tensor, Tensor]:
        """All training scenes of a seed, [count, 3, S, S] and [count, S, S]."""
        return self._many(False, self.count, seed)

    def training(self, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches [B, 3, S, S] and [B, S, S] of them without end."""
        images, masks = self.fixed(seed)
        for chosen in draws(self.count, seed, batch_size):
            yield images[chosen], masks[chosen]

    def held_out(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out scenes, the same for every seed."""
        images, masks = self._many(True, self.num_held_out, HELD_OUT_SEED)
        yield from zip(images.split(batch_size), masks.split(batch_size), strict=True)

    def _many(self, held_out: bool, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        scenes = [self.scene(held_out, generator) for _ in range(count)]
        images, masks = zip(*scenes, strict=True)
        return torch.stack(images), torch.stack(masks)

    def scene(self, held_out: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One image and its mask; the generator decides everything."""
        image = self.background(held_out, generator)
        mask = torch.zeros(image.shape[1:], dtype=torch.long)
        chosen = torch.randint(len(self.instances[held_out]), (DIGITS,), generator=generator)
        index = torch.from_numpy(self.instances[held_out])[chosen]
        inks = self._placed(self.digits[index], generator)
        colours = torch.rand(DIGITS, 3, generator=generator)
        colours = 1 - 0.6 * colours * colours.amax(1, keepdim=True)
        for ink, colour, label in zip(inks, colours, self.labels[index], strict=True):
            own = ink > INK
            if (own & (mask > 0)).any():
                continue
            paint = colour[:, None, None] * (ink / INK - 1).clamp(0, 1)
            image = torch.where(own, paint, image)
            mask[own] = label + 1
        return image, mask

    def background(self, held_out: bool, generator: torch.Generator) -> Tensor:
        """A square of one of the photographs [3, S, S], LEAST pixels or more, scaled to S."""
        regions = self.regions[held_out]
        photo = regions[_whole(len(regions), generator)]
        side = LEAST + _whole(min(photo.shape[1:]) - LEAST + 1, generator)
        top = _whole(photo.shape[1] - side + 1, generator)
        left = _whole(photo.shape[2] - side + 1, generator)
        crop = photo[None, :, top : top + side, left : left + side]
        size = (self.img_size, self.img_size)
        crop = F.interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)
        return crop[0].clamp(0, 1)

    def _placed(self, digits: Tensor, generator: torch.Generator) -> Tensor:
        """Digits [D, 8, 8] -> their ink in the scene [D, S, S]: turned, of any size, anywhere."""
        count = len(digits)
        share, x, y, turn = torch.rand(4, count, generator=generator)
        half = SIDE[0] + (SIDE[1] - SIDE[0]) * share  # of a digit, as the scene is 2 wide
        x, y = ((1 - half) * (2 * place - 1) for place in (x, y))
        angle = TURN * (2 * turn - 1)
        cos, sin = angle.cos() / half, angle.sin() / half
        # From the scene to the digit, which is what is sampled.
        rows = [cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y]
        theta = torch.stack(rows, 1).view(count, 2, 3)
        grid = F.affine_grid(theta, [count, 1, self.img_size, self.img_size], align_corners=False)
        return F.grid_sample(digits[:, None], grid, mode="bicubic", align_corners=False)[:, 0]


def draws(count: int, seed: int, batch_size: int) -> Iterator[Tensor]:
    """Indices [B] below count without end; every one once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]


def _whole(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
