"""What is done to each image of a batch: functions of (seed, epoch, place), as in sampling.py.

Every place of an epoch has its own row of uniform numbers, found without drawing those before it:
whatever process or resumed run takes a sample, it is treated alike. The rules are those of timm's
RandomResizedCropAndInterpolation, torchvision's ColorJitter and timm's RandomErasing, for all
images at once; but an erased patch is cut from one square of noise, the same for the whole run.

B images of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metala_vision.sampling import ON_DEVICE, stream

ATTEMPTS = 10  # to find a rectangle that fits
# Columns of a row of numbers.
CROP, FLIP, FILTER, JITTER, ERASE = 0, 22, 23, 24, 28
NUMBERS = 53
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Boxes:
    """A rectangle for each image [B], whole numbers of pixels."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


def uniform(seed: int, epoch: int, places: Sequence[int]) -> np.ndarray:
    """A row of numbers in [0, 1) for each place: [places, NUMBERS]."""
    first = min(places)
    numbers = np.random.PCG64(stream(seed, ON_DEVICE, epoch)).advance(first * NUMBERS)
    rows = np.random.Generator(numbers).random((max(places) + 1 - first, NUMBERS))
    return rows[np.asarray(places) - first]


def _rectangles(
    numbers: np.ndarray, area: float, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths [B, ATTEMPTS] of a share of the area and of ratios uniform by their
    logarithm."""
    shares = scale[0] + (scale[1] - scale[0]) * numbers[:, 0 : 2 * ATTEMPTS : 2]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + (high - low) * numbers[:, 1 : 2 * ATTEMPTS : 2])
    return np.sqrt(shares * area / ratios), np.sqrt(shares * area * ratios)


def _place(
    numbers: np.ndarray, heights: np.ndarray, widths: np.ndarray, fits: np.ndarray, size: Sequence
) -> Boxes:
    """The first rectangle that fits, anywhere in the image; where none does, of no height."""
    rows, first = np.arange(len(fits)), fits.argmax(1)
    height = np.where(fits.any(1), heights[rows, first], 0).astype(np.int64)
    width = np.where(fits.any(1), widths[rows, first], 0).astype(np.int64)
    top = (numbers[:, 2 * ATTEMPTS] * (size[0] - height + 1)).astype(np.int64)
    left = (numbers[:, 2 * ATTEMPTS + 1] * (size[1] - width + 1)).astype(np.int64)
    return Boxes(top, left, height, width)


def crops(
    numbers: np.ndarray, size: tuple[int, int], scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Boxes:  # fmt: skip
    """The part of each image [height, width = size] that becomes the whole.

    A rectangle of a share of the area in `scale` and of a width over height in `ratio`; where ten
    do not fit, the largest around the centre whose ratio is allowed.
    """
    numbers = numbers[:, CROP : CROP + 2 * ATTEMPTS + 2]
    height, width = size
    heights, widths = (
        np.maximum(np.rint(x), 1) for x in _rectangles(numbers, height * width, scale, ratio)
    )
    found = _place(numbers, heights, widths, (heights <= height) & (widths <= width), size)
    own = width / height
    whole = (
        round(width / min(ratio)) if own < min(ratio) else height,
        round(height * max(ratio)) if own > max(ratio) else width,
    )
    none = found.height == 0
    return Boxes(
        np.where(none, (height - whole[0]) // 2, found.top),
        np.where(none, (width - whole[1]) // 2, found.left),
        np.where(none, whole[0], found.height),
        np.where(none, whole[1], found.width),
    )


def flips(numbers: np.ndarray, probability: float) -> np.ndarray:
    """Whether each image is mirrored."""
    return numbers[:, FLIP] < probability


def bicubic(numbers: np.ndarray, interpolation: str) -> np.ndarray:
    """Whether each image is resampled so, else bilinear; "random" draws one of both."""
    if interpolation == "random":
        return numbers[:, FILTER] < 0.5
    return np.full(len(numbers), interpolation == "bicubic")


def jitters(numbers: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Of brightness, contrast and saturation the factors [B, 3] and the order [B, 3]."""
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * numbers[:, JITTER : JITTER + 3]
    orders = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
    return factors, orders[(numbers[:, JITTER + 3] * len(orders)).astype(np.int64)]


def erased(
    numbers: np.ndarray, size: tuple[int, int], probability: float, side: int
) -> tuple[Boxes, np.ndarray]:
    """The rectangle of each image that becomes noise, of no height where none does, and where in a
    square of noise of that side [B, 2] it is taken from."""
    own = numbers[:, ERASE + 1 :]
    height, width = size
    heights, widths = (
        np.rint(x) for x in _rectangles(own, height * width, ERASED_AREA, ERASED_RATIO)
    )
    fits = (heights < height) & (widths < width) & (numbers[:, ERASE, None] < probability)
    return _place(own, heights, widths, fits, size), (own[:, -2:] * side).astype(np.int64)
