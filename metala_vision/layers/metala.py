"""MetaLA, the token mixer: linear attention without keys.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / (2 H) key width per head, V = C / H value width per head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from metala_vision.kernels.gated_linear_attention import (
    DIRECTIONS,
    decay_and_key,
    gated_linear_attention_op,
)

from .conv import TokenConv

register_notrace_function(gated_linear_attention_op)
jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag


@register_notrace_function
def self_augmentation(
    q: Tensor, gate: Tensor, v: Tensor, weight: Tensor, gate_divisor: float
) -> Tensor:
    """sigmoid((q . (weight * (1 - alpha))) v) - 1/2: what a token adds to its own output.

    The half is the same in every channel, and the norm behind takes it away exactly. Kept, it
    would be a hundred times the output it is added to, and in 16 bits round that away.

    q, gate [B, N, H, K], v [B, N, H, V], weight [H, K] -> [B, N, H, V] in v's dtype.
    """
    _, _, key = decay_and_key(gate, gate_divisor)
    own = (q * weight * key).sum(-1, keepdim=True).to(v.dtype)
    return 0.5 * torch.tanh(0.5 * own * v)


class MetaLAMixer(nn.Module):
    """MetaLA over the tokens of a map.

        x = SiLU(conv(x))
        q, a, v = x W_Q, x W_alpha, x W_V          alpha = sigmoid(a)^(1 / 16), key 1 - alpha
        S_t = diag(alpha_t) S_{t-1} + (1 - alpha_t) v_t^T                          per head
        o_t = K^-0.5 S_t^T q_t + sigmoid((q_t . (w_aug * (1 - alpha_t))) v_t)
        y = (LayerNorm_head(o) * SiLU(x W_G + b_G)) W_O

    Source: MetaLA, arXiv 2411.10741, equations 21, 22 and A23 to A38; the order of norm and gate,
    the scale K^-0.5 (absent in the paper) and w_aug = 0 at the start are those of the authors'
    release. Differs for vision: the recurrence may run in either or both directions (their sum;
    the self-augmentation is added once), and the convolution may be 3x3 on the grid.

    Args:
        dim: C, divisible by 2 * num_heads.
        num_heads: H.
        conv: "depthwise2d", "causal1d" or "none", see TokenConv.
        direction: "forward", "backward" or "bidirectional".
    Raises:
        ValueError: for a width that the heads do not divide, another conv or direction.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"dim={dim} is not divisible by 2 * num_heads={2 * num_heads}")
        if direction not in DIRECTIONS:
            raise ValueError(
                f"direction={direction!r} is unknown; accepted: {', '.join(DIRECTIONS)}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.key_width = dim // (2 * num_heads)
        self.value_width = dim // num_heads
        self.direction = direction
        self.gate_divisor = 16.0  # tau of MetaLA, after GLA
        self.norm_eps = 1e-5  # of the authors' release
        self.conv = TokenConv(dim, conv, direction, **dd)
        # Rows of W_Q (C/2), W_alpha (C/2), W_V (C) and W_G (C): one product instead of four.
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.output_gate_bias = nn.Parameter(torch.empty(dim, **dd))
        self.w_aug = nn.Parameter(torch.empty(num_heads, self.key_width, **dd))
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        nn.init.zeros_(self.output_gate_bias)
        nn.init.zeros_(self.w_aug)

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW should not decay although they are matrices."""
        return {"w_aug"}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        H, K, V = self.num_heads, self.key_width, self.value_width
        q, gate, v, output_gate = self.in_proj(self.conv(x)).split([H * K, H * K, C, C], dim=3)
        q, gate = q.reshape(B, Gh * Gw, H, K), gate.reshape(B, Gh * Gw, H, K)
        v = v.reshape(B, Gh * Gw, H, V)
        o = gated_linear_attention_op(
            q, v, None, gate, None, self.gate_divisor, K**-0.5, self.direction, None
        )
        o = o + self_augmentation(q, gate, v, self.w_aug, self.gate_divisor)
        o = F.layer_norm(o, [V], eps=self.norm_eps).reshape(B, Gh, Gw, C)
        return self.out_proj(o * F.silu(output_gate + self.output_gate_bias))
