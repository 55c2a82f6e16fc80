"""Position information computed at run time, so that any grid has it and no checkpoint holds it.

Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads, K key width per head.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

POS_EMBEDS = ("none", "sincos2d", "rope2d")


def check_pos_embed(name: str) -> str:
    """The name unchanged, or a ValueError with the accepted ones."""
    if name not in POS_EMBEDS:
        raise ValueError(f"pos_embed={name!r} is unknown; accepted: {', '.join(POS_EMBEDS)}")
    return name


def _frequencies(count: int, base: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """base^(-i / count) for i < count."""
    return base ** (-torch.arange(count, device=device, dtype=dtype) / count)


@register_notrace_function
def add_sincos2d(x: Tensor) -> Tensor:
    """x [B, Gh, Gw, C] plus sine and cosine of row and column, a quarter of the channels each.

    Source: the fixed 2-D embedding of MoCo v3, arXiv 2104.02057; frequencies 10000^(-4 i / C).
    C is divisible by 4.
    """
    _, Gh, Gw, C = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = _frequencies(C // 4, 10000.0, x.device, dtype)
    row = torch.arange(Gh, device=x.device).to(dtype).unsqueeze(1) * frequency  # [Gh, C / 4]
    column = torch.arange(Gw, device=x.device).to(dtype).unsqueeze(1) * frequency
    rows = torch.cat([row.sin(), row.cos()], 1).unsqueeze(1).expand(Gh, Gw, C // 2)
    columns = torch.cat([column.sin(), column.cos()], 1).unsqueeze(0).expand(Gh, Gw, C // 2)
    return x + torch.cat([rows, columns], 2).to(x.dtype)


class SinCos2d(nn.Module):
    """`add_sincos2d` as a module without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        return add_sincos2d(x)


@register_notrace_function
def rope2d(q: Tensor, Gh: int, Gw: int) -> Tensor:
    """q [B, N, H, K], pairs of channels turned by angles that grow with the row and the column.

    The first half of the pairs turns with the row, the second with the column, so that the product
    of two turned vectors depends on the difference of their positions. Source: RoPE, arXiv
    2104.09864, in the axial form of arXiv 2403.13298; frequencies 100^(-4 i / K). K is divisible
    by 4. Queries and keys are both turned.
    """
    K = q.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    frequency = _frequencies(K // 4, 100.0, q.device, dtype)
    row = torch.arange(Gh, device=q.device).to(dtype).unsqueeze(1) * frequency  # [Gh, K / 4]
    column = torch.arange(Gw, device=q.device).to(dtype).unsqueeze(1) * frequency
    angle = torch.cat(
        [
            row.unsqueeze(1).expand(Gh, Gw, K // 4),
            column.unsqueeze(0).expand(Gh, Gw, K // 4),
        ],
        2,
    ).reshape(Gh * Gw, 1, K // 2)
    cos, sin = angle.cos(), angle.sin()
    even, odd = q[..., 0::2].to(dtype), q[..., 1::2].to(dtype)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], 4)
    return turned.reshape(q.shape).to(q.dtype)
