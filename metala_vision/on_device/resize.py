"""Crop and resize every image of a batch to one size, each by its own rectangle, as Pillow does.

A resized row of pixels is a sum of the row's pixels, so a batch is resized by two products with a
matrix for each image; only the matrices know of rectangle, filter and mirroring:

    x[b] -> round(A[b] round(x[b] B[b]^T))      A [B, S, height], B [B, S, width]

Pillow's weights are whole multiples of 2^-22, which float64 adds up without rounding: the result is
Pillow's, byte by byte, on every device, whatever its precision of float32 products. From Pillow 13
on that holds where both sides grow or both shrink: others it may shrink first. A device without
float64 takes float32, in which a sum next to a half may be rounded to the other side.

B batch, C channels of an image, S side of the result.
"""

import torch
from torch import Tensor

UNIT = 2**22  # Pillow's weights are multiples of 1 / UNIT


def exact(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def resize_weights(
    start: Tensor, length: Tensor, full: int, size: int, bicubic: Tensor, flip: Tensor | None = None
) -> Tensor:
    """The matrix of each image along one side, antialiased: [B, size, full].

    Args:
        start, length: the rectangle's [B], whole pixels.
        full: pixels of the side. size: of the result.
        bicubic: [B], else bilinear.
        flip: [B], or None, whether the result is mirrored.
    """
    dtype, device = exact(start.device), start.device
    scale = (length.to(dtype) / size)[:, None, None]  # pixels of the image to one of the result
    at = torch.arange(size, device=device).expand(len(start), size)
    if flip is not None:
        at = torch.where(flip[:, None], size - 1 - at, at)
    centre = (at + 0.5).to(dtype)[:, :, None] * scale
    pixel = torch.arange(full, device=device) - start[:, None, None]
    distance = (pixel + 0.5 - centre).abs() / scale.clamp_min(1.0)
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(bicubic[:, None, None], cubic, (1 - distance).clamp_min(0.0))
    inside = (pixel >= 0) & (pixel < length[:, None, None])
    weights = torch.where(inside, weights, 0.0)
    weights = weights / weights.sum(2, keepdim=True) * UNIT
    return (weights + 0.5 * weights.sign()).trunc() / UNIT


def rounded(x: Tensor) -> Tensor:
    """To the 256 values of a pixel."""
    return (x + 0.5).floor().clamp(0, 255)


def resize(x: Tensor, along_height: Tensor, along_width: Tensor) -> Tensor:
    """x [B, C, height, width], pixels 0 to 255 -> [B, C, S, S], the same as float32."""
    B, C, height, width = x.shape
    size = along_width.shape[1]
    x = x.to(along_width.dtype).reshape(B, C * height, width)
    x = rounded(x @ along_width.transpose(1, 2)).reshape(B, C, height, size)
    # The channels beside one another, for one product an image.
    x = along_height @ x.transpose(1, 2).reshape(B, height, C * size)
    x = rounded(x).reshape(B, size, C, size).transpose(1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format)
