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

from .mixer import TokenMixer, check_option, check_rope, check_widths
from .pos_embed import rope2d
from .scan import token_order

FEATURE_MAPS = ("elu", "relu")


@register_notrace_function
def positive(x: Tensor, elu: bool) -> Tensor:
    """phi(x) in float32 at least: elu(x) + 1, exact where it is small, or relu(x)."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.where(x > 0, x + 1.0, x.clamp_max(0.0).exp()) if elu else F.relu(x)


def _all_to_all(q: Tensor, k: Tensor, v: Tensor, turned_q: Tensor, turned_k: Tensor) -> Tensor:
    """Every token over all tokens, by two products; means instead of sums keep a script under
    float16's autocast, which it cannot leave, below 65504."""
    N = q.shape[1]
    total = (q * (k / N).sum(1, keepdim=True)).sum(3, keepdim=True)  # [B, N, H, 1]
    state = torch.matmul((turned_k / N).permute(0, 2, 3, 1), v.transpose(1, 2))  # [B, H, K, K]
    o = torch.matmul(turned_q.transpose(1, 2), state).transpose(1, 2)
    return o / (total + 1e-6 / N)


@register_notrace_function
def normalised_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turned_q: Tensor | None,
    turned_k: Tensor | None,
    direction: str,
    order: Tensor | None,
) -> Tensor:
    """o_t = (turned_q_t . sum turned_k v^T) / (q_t . sum k + 1e-6), sums over the tokens heard of.

    q, k [B, N, H, K] >= 0, float32 or float64, v [B, N, H, K] -> the same in v's dtype. Turned
    ones that are None are q and k. 1e-6 as in the authors' code.
    """
    wide = v.to(q.dtype)
    if direction == "bidirectional":
        numerator_q = q if turned_q is None else turned_q
        numerator_k = k if turned_k is None else turned_k
        if torch.jit.is_scripting():
            return _all_to_all(q, k, wide, numerator_q, numerator_k).to(v.dtype)
        else:
            if v.device.type != "meta" and torch.is_autocast_enabled(v.device.type):
                with torch.autocast(v.device.type, enabled=False):
                    return _all_to_all(q, k, wide, numerator_q, numerator_k).to(v.dtype)
            return _all_to_all(q, k, wide, numerator_q, numerator_k).to(v.dtype)
    one = torch.ones_like(wide[..., :1])
    if turned_q is None or turned_k is None:  # both sums in one
        both = gated_linear_attention_op(
            q, torch.cat([wide, one], 3), k, None, None, 1.0, 1.0, direction, order
        )
        o, total = both[..., :-1], both[..., -1:]
    else:
        o = gated_linear_attention_op(
            turned_q, wide, turned_k, None, None, 1.0, 1.0, direction, order
        )
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
        check_widths(self.width, self.width, num_heads)
        self.elu = check_option("feature_map", feature_map, FEATURE_MAPS) == "elu"
        self.rope = check_rope(rope, self.width, dim, num_heads)
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K = Gh * Gw, self.num_heads, self.width
        q, k, v = self.in_proj(self.conv(x)).reshape(B, N, 3, H, K).unbind(2)
        q, k = positive(q, self.elu), positive(k, self.elu)
        turned_q: Tensor | None = None
        turned_k: Tensor | None = None
        if self.rope:
            turned_q, turned_k = rope2d(q, Gh, Gw), rope2d(k, Gh, Gw)
        o = normalised_linear_attention(
            q, k, v, turned_q, turned_k, self.direction, token_order(x, self.scans, H)
        )
        return self.out_proj(o.reshape(B, Gh, Gw, C))
