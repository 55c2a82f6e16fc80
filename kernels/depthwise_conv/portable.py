"""The depthwise convolution with SiLU in plain scriptable PyTorch: the library's convolution.

Letters as in reference.py.
"""

import torch.nn.functional as F
from torch import Tensor


def portable(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    """[B, Gh, Gw, C] in x's dtype, under autocast in autocast's."""
    C, Th, Tw = weight.shape
    if Th == 1 and x.shape[1] == 1:  # a sequence
        tokens = F.pad(x[:, 0].transpose(1, 2), [left, Tw - 1 - left])
        z = F.conv1d(tokens, weight, bias, groups=C)
        return F.silu(z.transpose(1, 2)).unsqueeze(1)
    maps = x.permute(0, 3, 1, 2)
    if Th == 2 * top + 1 and Tw == 2 * left + 1:
        z = F.conv2d(maps, weight.unsqueeze(1), bias, padding=[top, left], groups=C)
    else:
        maps = F.pad(maps, [left, Tw - 1 - left, top, Th - 1 - top])
        z = F.conv2d(maps, weight.unsqueeze(1), bias, groups=C)
    return F.silu(z.permute(0, 2, 3, 1))
