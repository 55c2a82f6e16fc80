"""Undecayed linear attention with a positive feature map, as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / H width of queries, keys and values per head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from metala_vision.kernels.gated_linear_attention import gated_linear_attention_op

from .mixer import TokenMixer, check_option, check_rope
from .pos_embed import rope2d
from .scan import token_order

FEATURE_MAPS = ("elu", "relu")


def _all_to_all(q: Tensor, k: Tensor, v: Tensor, q_sum: Tensor, k_sum: Tensor) -> Tensor:
    """Every token over all tokens, by two products; float32 or float64, [B, N, H, K] -> same."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    total = torch.matmul(q_sum.transpose(1, 2), k_sum.sum(1).unsqueeze(3))  # [B, H, N, 1]
    return (torch.matmul(q, torch.matmul(k.transpose(2, 3), v)) / (total + 1e-6)).transpose(1, 2)


@register_notrace_function
def normalised_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turned_q: Tensor,
    turned_k: Tensor,
    direction: str,
    order: Tensor | None,
) -> Tensor:
    """o_t = (turned_q_t . sum turned_k v^T) / (q_t . sum k + 1e-6), sums over the tokens heard of.

    q, k [B, N, H, K] >= 0 and v -> [B, N, H, K] in v's dtype. Sums in float32; 1e-6 is
    the authors'.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k = q.to(dtype), k.to(dtype)
    turned_q, turned_k, wide = turned_q.to(dtype), turned_k.to(dtype), v.to(dtype)
    if direction == "bidirectional":
        if torch.jit.is_scripting():
            return _all_to_all(turned_q, turned_k, wide, q, k).to(v.dtype)
        else:
            if v.device.type != "meta" and torch.is_autocast_enabled(v.device.type):
                with torch.autocast(v.device.type, enabled=False):
                    return _all_to_all(turned_q, turned_k, wide, q, k).to(v.dtype)
            return _all_to_all(turned_q, turned_k, wide, q, k).to(v.dtype)
    o = gated_linear_attention_op(turned_q, wide, turned_k, None, None, 1.0, 1.0, direction, order)
    one = torch.ones_like(wide[..., :1])
    total = gated_linear_attention_op(q, one, k, None, None, 1.0, 1.0, direction, order)
    return (o / (total + 1e-6)).to(v.dtype)


class LinearAttentionMixer(TokenMixer):
    """Undecayed linear attention over the tokens of a map.

        x = SiLU(conv(x))
        q, k, v = phi(x W_Q), phi(x W_K), x W_V                  phi(x) = elu(x) + 1
        o_t = (sum_s (q_t . k_s) v_s) / (sum_s q_t . k_s + 1e-6)  per head
        y = o W_O

    s runs over all tokens with direction="bidirectional", each once, over those up to t with
    "forward", over those from t on with "backward".

    Source: the linear Transformer, arXiv 2006.16236, equations 4 to 12; the row that MetaLA's
    tables call LinFormer (its reference 9). Differs for vision: the convolution (none is
    published), and no bias. Bidirectional it is blind to order without position information or a
    convolution: the scan changes nothing.

    Args:
        dim, num_heads, conv, direction, scans: see TokenMixer.
        feature_map: phi: "elu" (elu + 1) or "relu".
        rope: turn queries and keys by their position in the numerator, as RoFormer, arXiv
            2104.09864, equation 19; needs K divisible by 4.
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
        feature_map: str = "elu",
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, **dd)
        self.width = dim // num_heads
        self.elu = check_option("feature_map", feature_map, FEATURE_MAPS) == "elu"
        self.rope = check_rope(rope, self.width, dim, num_heads)
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K = Gh * Gw, self.num_heads, self.width
        q, k, v = self.in_proj(self.conv(x)).reshape(B, N, 3, H, K).unbind(2)
        if self.elu:
            q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        else:
            q, k = F.relu(q), F.relu(k)
        turned_q, turned_k = q, k
        if self.rope:
            turned_q, turned_k = rope2d(q, Gh, Gw), rope2d(k, Gh, Gw)
        o = normalised_linear_attention(
            q, k, v, turned_q, turned_k, self.direction, token_order(x, self.scans, H)
        )
        return self.out_proj(o.reshape(B, Gh, Gw, C))
