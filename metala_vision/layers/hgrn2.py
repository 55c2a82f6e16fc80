"""HGRN2, a gated recurrence with an outer-product state, as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / H width of keys and values per head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metala_vision.kernels.gated_linear_attention import gated_linear_attention_op

from .lower_bound import bounded_log_decay
from .mixer import TokenMixer, check_rope, check_widths
from .pos_embed import rope2d
from .scan import token_order


class HGRN2Mixer(TokenMixer):
    """HGRN2 over the tokens of a map.

        x = SiLU(conv(x))
        q, f, i = sigmoid(x W_Q + b_Q), gamma + (1 - gamma) sigmoid(x W_F + b_F), SiLU(x W_I + b_I)
        S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T                per head
        y = LayerNorm(S_t^T q_t) W_O                             over all heads

    gamma [C], the least decay of a layer, comes from the backbone and grows with depth (see
    LowerBounds).

    Source: HGRN2, arXiv 2404.07904, as released by its authors: no scale, no other gate, both
    directions summed before the norm. Differs for vision: the convolution (none is published) and
    any scan order. Decided here, as no text settles it: K = C / num_heads = 64 (published are
    expansions up to 128, none for vision), no bias on W_O.

    Args:
        dim, num_heads, conv, direction, scans: see TokenMixer.
        rope: turn queries and keys by their position, see rope2d; needs K divisible by 4.
    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        scans: str | Sequence[str] = "raster",
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, **dd)
        self.width = dim // num_heads
        check_widths(self.width, self.width, num_heads)
        self.rope = check_rope(rope, self.width, dim, num_heads)
        self.in_proj = nn.Linear(dim, 3 * dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor, lower_bound: Tensor | None = None) -> Tensor:
        """x [B, Gh, Gw, C], lower_bound [C] (None is 0) -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K = Gh * Gw, self.num_heads, self.width
        q, gate, v = self.in_proj(self.conv(x)).chunk(3, dim=3)
        q, v = q.sigmoid().reshape(B, N, H, K), F.silu(v).reshape(B, N, H, K)
        log_decay = bounded_log_decay(gate, lower_bound).reshape(B, N, H, K)
        key: Tensor | None = None
        if self.rope:
            q, key = rope2d(q, Gh, Gw), rope2d(-torch.expm1(log_decay), Gh, Gw).to(q.dtype)
        o = gated_linear_attention_op(
            q, v, key, None, log_decay, 1.0, 1.0, self.direction, token_order(x, self.scans, H)
        )
        return self.out_proj(self.norm(o.reshape(B, Gh, Gw, C)))
