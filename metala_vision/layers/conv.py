"""The short depthwise convolution in front of a token mixer, the same for every family.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = ("depthwise2d", "causal1d", "none")


class TokenConv(nn.Module):
    """Depthwise convolution and SiLU on a token map.

        depthwise2d: 3x3 on the grid, zeros outside
        causal1d: over the last four tokens in raster order (the next four with
            direction="backward", so that a mixer stays causal in its own direction)
        none: the identity, without SiLU

    Source: causal1d of width 4 is that of MetaLA, arXiv 2411.10741, section 4; depthwise2d that of
    ViG, arXiv 2405.18425. Neither has a bias; Mamba's, arXiv 2312.00752, does.

    Args:
        dim: C.
        kind: "depthwise2d", "causal1d" or "none".
        direction: of the mixer behind it; "bidirectional" convolves as "forward" does.
        bias: add one.
    Raises:
        ValueError: for another kind.
    """

    def __init__(
        self,
        dim: int,
        kind: str = "depthwise2d",
        direction: str = "forward",
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kind not in CONVS:
            raise ValueError(f"conv={kind!r} is unknown; accepted: {', '.join(CONVS)}")
        self.kind = kind
        self.reverse = direction == "backward"
        self.conv: nn.Module = nn.Identity()
        if kind == "depthwise2d":
            self.conv = nn.Conv2d(
                dim, dim, 3, padding=1, groups=dim, bias=bias, device=device, dtype=dtype
            )
        elif kind == "causal1d":
            self.conv = nn.Conv1d(dim, dim, 4, groups=dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        if self.kind == "none":
            return x
        if self.kind == "depthwise2d":
            return F.silu(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        tokens = x.flatten(1, 2).transpose(1, 2)  # [B, C, N]
        if self.reverse:
            tokens = torch.flip(tokens, [2])
        tokens = self.conv(F.pad(tokens, [3, 0]))
        if self.reverse:
            tokens = torch.flip(tokens, [2])
        return F.silu(tokens.transpose(1, 2).reshape(x.shape))
