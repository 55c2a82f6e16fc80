"""Colours of a batch: jitter as Pillow does it, normalisation, and patches of noise.

B batch, C channels and S side of the images.
"""

import torch
from torch import Tensor

GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # of red, green, blue; Pillow's


def grey(x: Tensor) -> Tensor:
    """[B, C, S, S] -> [B, 1, S, S], rounded; one channel is grey already."""
    if x.shape[1] == 1:
        return x
    red, green, blue = (x[:, i : i + 1] * share for i, share in enumerate(GREY))
    return (red + green + blue + 0.5).floor()


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast and saturation of each image, by its factors and in its order.

        x -> other + factor (x - other), cut to 0 ... 255 and to whole numbers

    other is black, the image's mean grey, or its grey pixels.

    Args:
        x: [B, C, S, S], pixels 0 to 255. factors: [B, 3]. order: [B, 3] of 0, 1, 2.
    """
    for stage in range(3):
        which = order[:, stage]
        factor = factors.gather(1, which[:, None])[:, :, None, None].to(x.dtype)
        shades = grey(x)
        mean = (shades.mean((2, 3), keepdim=True) + 0.5).floor()
        which = which[:, None, None, None]
        other = torch.where(which == 0, 0.0, torch.where(which == 1, mean, shades))
        x = (other + factor * (x - other)).clamp(0, 255).floor()
    return x


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels 0 to 255 [B, C, S, S] -> (x / 255 - mean) / std, mean and std [C]."""
    return (x.float() / 255 - mean[:, None, None]) / std[:, None, None]


def erase(x: Tensor, box: tuple[Tensor, Tensor, Tensor, Tensor], noise: Tensor, at: Tensor):
    """A rectangle of each image becomes a part of the noise.

    Args:
        x: [B, C, S, S]. box: top, left, height, width [B]; of no height nothing is changed.
        noise: [C, side, side], continued beyond its edges. at: [B, 2], where in it the image lies.
    """
    top, left, height, width = (value[:, None] for value in box)
    own, side = torch.arange(x.shape[2], device=x.device), noise.shape[1]
    rows, columns = (own >= top) & (own < top + height), (own >= left) & (own < left + width)
    y, across = (own + at[:, :1]) % side, (own + at[:, 1:]) % side
    patch = noise[:, y[:, :, None], across[:, None, :]].transpose(0, 1)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, patch, x)
