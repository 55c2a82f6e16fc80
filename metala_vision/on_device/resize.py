"""Crop and resize every image of a batch to one size, each by its own rectangle.

A resized row of pixels is a sum of the row's pixels, so a batch is resized by two products with a
matrix for each image; only the matrices know of rectangle, filter and mirroring:

    x[b] -> round(A[b] round(x[b] B[b]^T))      A [B, S, height], B [B, S, width]

Weights, order of the passes and rounding are Pillow's (antialiased, crop first), so the result is
Pillow's to the last bit but for ties. From Pillow 13 on that holds where both sides grow or both
shrink: others it may shrink first.
"""

import torch
from torch import Tensor


def resize_weights(
    start: Tensor, length: Tensor, full: int, size: int, bicubic: Tensor, flip: Tensor | None = None
) -> Tensor:
    """The matrix of each image along one side: [B, size, full].

    Args:
        start, length: the rectangle's [B], whole pixels.
        full: pixels of the side. size: of the result.
        bicubic: [B], else bilinear.
        flip: [B], or None, whether the result is mirrored.
    """
    device = start.device
    scale = (length / size)[:, None, None]  # pixels of the image to one of the result
    at = torch.arange(size, device=device)
    at = at.expand(len(start), size)
    if flip is not None:
        at = torch.where(flip[:, None], size - 1 - at, at)
    centre = (at + 0.5)[:, :, None] * scale
    pixel = torch.arange(full, device=device) - start[:, None, None]
    distance = (pixel + 0.5 - centre).abs() / scale.clamp_min(1.0)
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(bicubic[:, None, None], cubic, (1 - distance).clamp_min(0.0))
    inside = (pixel >= 0) & (pixel < length[:, None, None])
    weights = torch.where(inside, weights, 0.0)
    return weights / weights.sum(2, keepdim=True)


def rounded(x: Tensor) -> Tensor:
    """To the 256 values of a pixel."""
    return (x + 0.5).floor().clamp(0, 255)


def resize(x: Tensor, along_height: Tensor, along_width: Tensor) -> Tensor:
    """x [B, C, height, width], pixels 0 to 255 -> [B, C, S, S], the same as float32."""
    x = rounded(x.float() @ along_width.transpose(1, 2)[:, None])
    return rounded(along_height[:, None] @ x)
