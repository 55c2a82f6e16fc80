"""Softmax attention as a token mixer: the control.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / H width of queries, keys and values per head.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from .mixer import TokenMixer, check_rope
from .pos_embed import rope2d
from .scan import inverse, token_order, visit


@register_notrace_function
def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, direction: str, order: Tensor | None
) -> Tensor:
    """q, k, v [B, N, H, K] -> [B, N, H, K]; forward and backward hear of their side of the scan."""
    ordered = order is not None and direction != "bidirectional"
    if ordered and order is not None:
        q, k, v = visit(q, order), visit(k, order), visit(v, order)
    if direction == "backward":
        q, k, v = q.flip(1), k.flip(1), v.flip(1)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        is_causal=direction != "bidirectional",
    ).transpose(1, 2)  # fmt: skip
    if direction == "backward":
        o = o.flip(1)
    if ordered and order is not None:
        o = visit(o, inverse(order))
    return o


class AttentionMixer(TokenMixer):
    """Softmax attention over the tokens of a map.

        x = SiLU(conv(x))
        q, k, v = x W_Q, x W_K, x W_V
        o_t = sum_s softmax_s(K^-0.5 q_t . k_s) v_s              per head
        y = o W_O

    s runs over all tokens with direction="bidirectional", over those up to t with "forward", over
    those from t on with "backward".

    Source: arXiv 1706.03762, equation 1. Differs from DeiT, arXiv 2012.12877: no bias, and the
    convolution; DeiT itself is timm's deit_tiny_patch16_224. Bidirectional it is blind to order
    without position information or a convolution: the scan changes nothing.

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
        self.rope = check_rope(rope, self.width, dim, num_heads)
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K = Gh * Gw, self.num_heads, self.width
        q, k, v = self.in_proj(self.conv(x)).reshape(B, N, 3, H, K).unbind(2)
        if self.rope:
            q, k = rope2d(q, Gh, Gw), rope2d(k, Gh, Gw)
        o = softmax_attention(q, k, v, self.direction, token_order(x, self.scans, H))
        return self.out_proj(o.reshape(B, Gh, Gw, C))
