"""MetaLA, the token mixer: linear attention without keys.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / (2 H) key width per head, V = C / H value width per head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from metala_vision.kernels.gated_linear_attention import (
    decay_and_key,
    gated_linear_attention_op,
)
from metala_vision.kernels.gated_norm import gated_norm_op

from .mixer import TokenMixer, check_decays, check_option, check_rope, check_widths
from .pos_embed import rope2d
from .scan import token_order

register_notrace_function(gated_linear_attention_op)
register_notrace_function(gated_norm_op)
jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag

KEYS = ("decay", "projected")


@register_notrace_function
def decay_key(gate: Tensor, gate_divisor: float, like: Tensor) -> Tensor:
    """The key 1 - alpha as a tensor of `like`'s dtype."""
    return decay_and_key(gate, gate_divisor)[1].to(like.dtype)


def takes_decays(q: Tensor) -> bool:
    """Whether decay and key are made before the operator, which the portable form would make once
    more; a kernel reads less from the gate."""
    return q.device.type == "cpu"


@register_notrace_function
def attend(
    q: Tensor,
    k: Tensor | None,
    turned_q: Tensor,
    turned_k: Tensor | None,
    v: Tensor,
    gates: Tensor,
    output_gate: Tensor,
    bias: Tensor,
    w_aug: Tensor | None,
    gate_divisor: float,
    direction: str,
    order: Tensor | None,
    eps: float,
) -> Tensor:
    """The operator, what each token adds to its own output (once, whatever the direction), the norm
    of each head and the output gate.

    What a token adds is sigmoid((q . (w_aug * k)) v) - 1/2: the half is the same in every channel,
    and the norm takes it away exactly. Kept, it would be a hundred times the output it is added to,
    and in 16 bits round that away.

    The operator takes queries and keys turned by their position. q, k [B, N, H, K], gates
    [D, B, N, H, K], v, output_gate [B, N, H, V], bias [H, V], w_aug [H, K] -> [B, N, H, V] in v's
    dtype. A k that is None is 1 - alpha.
    """
    scale = q.shape[3] ** -0.5
    D = gates.shape[0]
    key = k
    if w_aug is not None and k is None and D == 1 and turned_k is None and takes_decays(q):
        log_decay, key = decay_and_key(gates[0], gate_divisor)
        o = gated_linear_attention_op(
            turned_q, v, key, None, log_decay, gate_divisor, scale, direction, order
        )
    else:
        gate = gates[0] if D == 1 else gates
        o = gated_linear_attention_op(
            turned_q, v, turned_k, gate, None, gate_divisor, scale, direction, order
        )
    return gated_norm_op(
        o, output_gate, bias, q, key, gates[0], v, w_aug, gate_divisor, "layer", eps
    )


class MetaLAMixer(TokenMixer):
    """MetaLA over the tokens of a map.

        x = SiLU(conv(x))
        q, a, v = x W_Q, x W_alpha, x W_V          alpha = sigmoid(a)^(1 / tau), key 1 - alpha
        S_t = diag(alpha_t) S_{t-1} + (1 - alpha_t) v_t^T                          per head
        o_t = K^-0.5 S_t^T q_t + sigmoid((q_t . (w_aug * (1 - alpha_t))) v_t)
        y = (LayerNorm_head(o) * SiLU(x W_G + b_G)) W_O

    Source: MetaLA, arXiv 2411.10741, equations 21, 22 and A23 to A38; the order of norm and gate,
    the scale K^-0.5 (absent in the paper) and w_aug = 0 at the start are those of the authors'
    release. Differs for vision: the recurrence may run in either or both directions (their sum;
    the self-augmentation is added once), along any scan order, and the convolution may be 3x3 on
    the grid.

    Args:
        dim: C, divisible by 2 * num_heads.
        num_heads: H.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none", see TokenConv; always along
            the raster.
        direction: "forward", "backward" or "bidirectional".
        scans: the order in which tokens are visited, see scan_order; several names divide the
            heads among them. The output is in raster order whatever the scan.
        self_aug: add the self-augmentation.
        key: "decay" is 1 - alpha; "projected" adds a projection W_K.
        tau: > 0; the larger, the longer the memory.
        shared_decay: one alpha for both directions; False projects one for each.
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
        self_aug: bool = True,
        key: str = "decay",
        tau: float = 16.0,
        shared_decay: bool = True,
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, widths=2, **dd)
        check_option("key", key, KEYS)
        if not tau > 0:
            raise ValueError(f"tau must be > 0, got {tau}")
        check_decays(shared_decay, direction)
        if rope and key == "decay" and not shared_decay:
            raise ValueError("rope with shared_decay=False needs key='projected', got key='decay'")
        self.key_width = dim // (2 * num_heads)
        self.value_width = dim // num_heads
        check_widths(self.key_width, self.value_width, num_heads)
        self.self_aug = self_aug
        self.projected_key = key == "projected"
        self.rope = check_rope(rope, self.key_width, dim, num_heads)
        self.num_decays = 1 if shared_decay else 2
        self.gate_divisor = float(tau)
        self.norm_eps = 1e-5  # of the authors' release
        # Rows of W_Q, W_alpha (one or two), W_K (if any), W_V and W_G: one product instead of four.
        keyed = 1 + self.num_decays + int(self.projected_key)
        self.in_proj = nn.Linear(dim, keyed * (dim // 2) + 2 * dim, bias=False, **dd)
        self.output_gate_bias = nn.Parameter(torch.empty(dim, **dd))
        if self_aug:
            self.w_aug = nn.Parameter(torch.empty(num_heads, self.key_width, **dd))
        else:
            self.register_parameter("w_aug", None)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        nn.init.zeros_(self.output_gate_bias)
        if self.w_aug is not None:
            nn.init.zeros_(self.w_aug)

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW should not decay although they are matrices."""
        return {"w_aug"} if self.self_aug else set()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K, V, D = Gh * Gw, self.num_heads, self.key_width, self.value_width, self.num_decays
        keys = H * K if self.projected_key else 0
        q, gate, k, v, output_gate = self.in_proj(self.conv(x)).split(
            [H * K, D * H * K, keys, C, C], dim=3
        )
        q, v = q.reshape(B, N, H, K), v.reshape(B, N, H, V)
        output_gate = output_gate.reshape(B, N, H, V)
        key: Tensor | None = k.reshape(B, N, H, K) if self.projected_key else None
        gates = gate.reshape(B, N, D, H, K).permute(2, 0, 1, 3, 4)
        query, turned = q, key
        if self.rope:
            if turned is None:
                turned = decay_key(gates[0], self.gate_divisor, q)
            query, turned = rope2d(q, Gh, Gw), rope2d(turned, Gh, Gw)
        y = attend(
            q, key, query, turned, v, gates, output_gate, self.output_gate_bias.view(H, V),
            self.w_aug, self.gate_divisor, self.direction, token_order(x, self.scans, H),
            self.norm_eps,
        )  # fmt: skip
        return self.out_proj(y.reshape(B, Gh, Gw, C))
