"""The definition of the depthwise convolution with SiLU that stands in front of a mixer.

    z_{i, j} = bias + sum over r, s of weight_{r, s} x_{i + r - top, j + s - left}    per channel
    y = z sigmoid(z)

with x = 0 outside the grid. B batch, Gh x Gw the token grid, C width, Th x Tw taps. Slow, short and
meant to be read; every other form is proven against it in float64. It shares no code with them.
"""

import torch
from torch import Tensor


def reference(
    x: Tensor,  # [B, Gh, Gw, C]
    weight: Tensor,  # [C, Th, Tw]
    bias: Tensor | None,  # [C]
    top: int,
    left: int,
) -> Tensor:
    """[B, Gh, Gw, C] in x's dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    B, Gh, Gw, C = x.shape
    _, Th, Tw = weight.shape
    wide = torch.zeros(B, Gh + Th - 1, Gw + Tw - 1, C, dtype=dtype, device=x.device)
    wide[:, top : top + Gh, left : left + Gw] = x.to(dtype)
    z = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for r in range(Th):
        for s in range(Tw):
            z = z + weight[:, r, s].to(dtype) * wide[:, r : r + Gh, s : s + Gw]
    if bias is not None:
        z = z + bias.to(dtype)
    return (z * torch.sigmoid(z)).to(x.dtype)
