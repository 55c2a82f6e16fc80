"""GLA, gated linear attention as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / (2 H) key width per head, V = C / H value width per head, D decays (1 or 2).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metala_vision.kernels.gated_linear_attention import gated_linear_attention_op
from metala_vision.kernels.gated_norm import NORMS, gated_norm_op

from .mixer import TokenMixer, check_decays, check_option, check_rope, check_widths
from .pos_embed import rope2d
from .scan import token_order


class GLAMixer(TokenMixer):
    """Gated linear attention over the tokens of a map.

        x = SiLU(conv(x))
        q, k, v, r = x W_Q, x W_K, x W_V, x W_R
        alpha = sigmoid(x W_1 W_2 + b)^(1 / tau)                 W_1 [C, 16], W_2 [16, C / 2]
        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T                  per head
        o_t = K^-0.5 S_t^T q_t
        y = (norm_head(o) * SiLU(r + b_R)) W_O

    Source: GLA, arXiv 2312.06635, section 4.4; the LayerNorm is without weights as in the authors'
    small repository (flash-linear-attention has a weighted RMSNorm, and no b_R).
    Differs for vision: the convolution (GLA has none), any direction and scan order. With
    shared_decay=False, average=True and norm="rms" the recurrence is that of ViG, arXiv 2405.18425,
    whose local gating is left out. The backbone's initialisation instead of Xavier's.

    Args:
        dim, num_heads, conv, direction, scans: see TokenMixer; dim divisible by 2 * num_heads.
        shared_decay: one alpha for both directions; False projects one for each.
        average: the mean of both directions instead of their sum (the norm leaves nothing of the
            difference but its eps).
        norm: "layer" or "rms", per head.
        tau: > 0; the larger, the longer the memory.
        rank: of the decay's projection.
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
        shared_decay: bool = True,
        average: bool = False,
        norm: str = "layer",
        tau: float = 16.0,
        rank: int = 16,
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, widths=2, **dd)
        if not tau > 0:
            raise ValueError(f"tau must be > 0, got {tau}")
        if rank < 1 or rank != int(rank):
            raise ValueError(f"rank must be a whole number >= 1, got {rank}")
        check_decays(shared_decay, direction)
        if average and direction != "bidirectional":
            raise ValueError(f"average=True needs direction='bidirectional', got {direction!r}")
        self.key_width = dim // (2 * num_heads)
        self.value_width = dim // num_heads
        check_widths(self.key_width, self.value_width, num_heads)
        self.rope = check_rope(rope, self.key_width, dim, num_heads)
        self.norm = check_option("norm", norm, NORMS)
        self.norm_eps = 1e-5
        self.num_decays = 1 if shared_decay else 2
        self.gate_divisor = float(tau)
        self.scale = self.key_width**-0.5 * (0.5 if average else 1.0)
        # Rows of W_Q, W_K, W_V, W_R and W_1: one product instead of five.
        self.rank = rank
        self.in_proj = nn.Linear(dim, 3 * dim + rank, bias=False, **dd)
        self.decay_proj = nn.Linear(rank, self.num_decays * (dim // 2), **dd)
        self.output_gate_bias = nn.Parameter(torch.empty(dim, **dd))
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        nn.init.zeros_(self.output_gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K, V, D = Gh * Gw, self.num_heads, self.key_width, self.value_width, self.num_decays
        q, k, v, output_gate, low = self.in_proj(self.conv(x)).split(
            [H * K, H * K, C, C, self.rank], dim=3
        )
        gates = self.decay_proj(low).reshape(B, N, D, H, K).permute(2, 0, 1, 3, 4)
        q, k = q.reshape(B, N, H, K), k.reshape(B, N, H, K)
        if self.rope:
            q, k = rope2d(q, Gh, Gw), rope2d(k, Gh, Gw)
        o = gated_linear_attention_op(
            q, v.reshape(B, N, H, V), k, gates[0] if D == 1 else gates, None, self.gate_divisor,
            self.scale, self.direction, token_order(x, self.scans, H),
        )  # fmt: skip
        y = gated_norm_op(
            o, output_gate.reshape(B, N, H, V), self.output_gate_bias.view(H, V), None, None, None,
            None, None, self.gate_divisor, self.norm, self.norm_eps,
        )  # fmt: skip
        return self.out_proj(y.reshape(B, Gh, Gw, C))
