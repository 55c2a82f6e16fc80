"""Effective receptive fields: the pixels on which one token of the last map depends.

H x W an image's height and width, Gh x Gw the grid of the last map.
"""

import torch
from torch import Tensor, nn

from metala_vision.errors import UserError

from .maps import feature_map

HELD = (0.5, 0.9, 0.95)  # shares of the gradient whose squares are told


def receptive_field(
    model: nn.Module, images: Tensor, token: tuple[int, int] | None, name: str
) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """The mean over images of |d sum_c f[c, token] / d pixel|, summed over the colour channels.

    f is the last map before the final norm (see maps.feature_map), and the gradient is that by the
    pixel as the model takes it, after normalisation. An image counts by its own gradient: the
    absolute value is taken before the mean.

    Source: the effective receptive field, Luo et al. 2016, arXiv 1701.04128. Differs: they start
    from one unit and let random weights average; here the channels are summed, and the mean over
    images is one of absolute values.

    Args:
        images: [B, C, H, W], preprocessed. token: (row, column); None for the middle of the grid.
        name: of the model, for errors.
    Returns:
        The field [H, W], float64; the grid; the token.
    Raises:
        UserError: no map of features, a token outside of the grid, or no gradient at all.
    """
    total = torch.zeros(images.shape[2:], dtype=torch.float64)
    grid, at = (0, 0), (0, 0)
    for image in images:
        x = image.unsqueeze(0).clone().requires_grad_()
        features = feature_map(model, x, name)
        grid = features.shape[2], features.shape[3]
        at = check_token(token, grid)
        (gradient,) = torch.autograd.grad(features[0, :, at[0], at[1]].sum(), x)
        total += gradient[0].double().abs().sum(0)
    if not total.isfinite().all() or not total.any():
        raise UserError(f"{name} has no gradient at token {at}: it is 0 or not finite everywhere")
    return total / len(images), grid, at


def check_token(token: tuple[int, int] | None, grid: tuple[int, int]) -> tuple[int, int]:
    """The token, by default that in the middle (below and right of it on an even grid)."""
    if token is None:
        return grid[0] // 2, grid[1] // 2
    if not all(0 <= at < size for at, size in zip(token, grid, strict=True)):
        raise UserError(
            f"--token {token[0]} {token[1]} is not on the grid of {grid[0]} x {grid[1]} tokens; "
            f"accepted: row 0 to {grid[0] - 1}, column 0 to {grid[1] - 1}"
        )
    return token


def growing_squares(
    field: Tensor, token: tuple[int, int], grid: tuple[int, int]
) -> tuple[list[int], list[float], list[float]]:
    """What squares around the token's patch hold: sides in pixels, share of the field, and share
    of the image's area. A square is cut at the edges of the image; the last holds all.

    Args:
        field: [H, W], >= 0, not all 0.
    """
    away = []
    for at, patches, size in zip(token, grid, field.shape, strict=True):
        middle = (at + 0.5) * size / patches
        away.append((torch.arange(size, dtype=torch.float64) + 0.5 - middle).abs())
    # The square that has a pixel reaches from the middle to the pixel's far edge.
    side = (2 * torch.maximum(away[0][:, None], away[1][None]) + 1).round().long().flatten()
    sides, which = side.unique(return_inverse=True)
    held = torch.zeros(len(sides), dtype=torch.float64)
    held.index_add_(0, which, field.double().flatten())
    area = torch.bincount(which, minlength=len(sides)).double()
    shares, areas = ((x.cumsum(0) / x.sum()).tolist() for x in (held, area))
    return sides.tolist(), shares, areas


def side_that_holds(share: float, sides: list[int], shares: list[float]) -> int:
    """The least side whose square has at least that share."""
    return next(s for s, held in zip(sides, shares, strict=True) if held >= share - 1e-12)
