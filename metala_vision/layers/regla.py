"""ReGLA, gated linear attention with exponential features and a refined gate, as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / H width of queries, keys and values per head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from metala_vision.kernels.gated_linear_attention import gated_linear_attention_op

from .mixer import TokenMixer, check_rope, check_widths
from .pos_embed import rope2d
from .scan import inverse, token_order, visit


def variance_scale(K: int) -> float:
    """1 / (e sqrt(K (e^2 - 1))): sum_K exp(x) exp(y) of normal x and y then has variance 1.

    Source: ReGLA, arXiv 2502.01578, theorem 3.1, second hand. The norm behind takes it away but
    for its eps.
    """
    return 1 / (math.e * math.sqrt(K * (math.e**2 - 1)))


@register_notrace_function
def refined_log_decay(gate: Tensor, refining: Tensor | None) -> Tensor:
    """log F of the logits of g and r, float32 at least; without r log g.

        F = (1 - r) g^2 + r (1 - (1 - g)^2) = g (g + 2 r (1 - g))
        1 - F = (1 - g) ((1 - g) + 2 (1 - r) g)

    Every factor is made from its logarithm and every sum is of positive terms: F near 0 and 1 - F
    near 0 are exact relative to their value, and so are their gradients. Finite for any logits.
    """
    dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    gate = gate.to(dtype)
    log_g = F.logsigmoid(gate)
    if refining is None:
        return log_g
    log_lost = F.logsigmoid(-gate)
    log_2r = F.logsigmoid(refining.to(dtype)) + math.log(2.0)
    log_2w = F.logsigmoid(-refining.to(dtype)) + math.log(2.0)
    short = log_g + torch.logaddexp(log_g, log_2r + log_lost)
    lost = (2.0 * log_lost).exp() + (log_lost + log_2w + log_g).exp()
    # Clamped where it is not taken: the gradient of what is not taken must be finite too.
    return torch.where(lost < 0.5, torch.log1p(-lost.clamp_max(0.5)), short)


@register_notrace_function
def running_maximum(x: Tensor, direction: str, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """m_t, the greatest of x [B, N, H, 1] among the tokens visited up to t, and m_{t-1} - m_t <= 0,
    which is 0 for the first token; both in raster order.

    direction: "forward" or "backward".
    """
    N = x.shape[1]
    any_size = False
    if not torch.jit.is_scripting():
        any_size = isinstance(N, torch.SymInt)
    if order is not None:
        x = visit(x, order)
    if direction == "backward":
        x = x.flip(1)
    step = torch.arange(N, device=x.device)
    if any_size:  # one graph for every N: a table of N^2 in place of log2(N) steps
        heard = step.view(1, N, 1, 1) <= step.view(N, 1, 1, 1)
        m = torch.where(heard, x.unsqueeze(1), -math.inf).amax(2)
    else:
        m, s = x, 1
        while s < N:  # m holds the maximum of s tokens: take that of the s before them
            m = torch.cat([m[:, :s], torch.maximum(m[:, s:], m[:, : N - s])], 1)
            s *= 2
    fall = torch.where(step.view(N, 1, 1) > 0, m.roll(1, 1), m) - m
    if direction == "backward":
        m, fall = m.flip(1), fall.flip(1)
    if order is not None:
        back = inverse(order)
        m, fall = visit(m, back), visit(fall, back)
    return m, fall


@register_notrace_function
def exponential_features(
    q: Tensor, k: Tensor, direction: str, order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """exp(q_t - max q_t) and exp(k_t - m_t), both in (0, 1] and in float32 at least; and
    m_{t-1} - m_t [B, N, H, 1], a log decay that takes the state of the tokens before t from one
    maximum to the next, or None where m is the same for all tokens.

    q, k [B, N, H, K]. m is of a head and image: over the features of all tokens where a token
    hears of all, else over those of the tokens visited so far, so that none hears of a later one.
    Either way a token's output is what it would be without m, times a factor > 0.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(dtype), k.to(dtype)
    fall: Tensor | None = None
    if direction == "bidirectional":
        m = k.amax(dim=[1, 3], keepdim=True)
    else:
        m, fall = running_maximum(k.amax(dim=3, keepdim=True), direction, order)
    return (q - q.amax(dim=3, keepdim=True)).exp(), (k - m).exp(), fall


@register_notrace_function
def exponential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    Gh: int,
    Gw: int,
    rope: bool,
    scale: float,
    direction: str,
    order: Tensor | None,
) -> Tensor:
    """Gated linear attention over exponential features, turned by position with rope.

    q, k, v [B, N, H, K], log_decay [B, N, H, K] <= 0 of the gates alone -> [B, N, H, K] in v's
    dtype, each token's up to a factor > 0, see exponential_features.
    """
    phi_q, phi_k, fall = exponential_features(q, k, direction, order)
    if fall is not None:
        log_decay = log_decay + fall
    if rope:
        phi_q, phi_k = rope2d(phi_q, Gh, Gw), rope2d(phi_k, Gh, Gw)
    return gated_linear_attention_op(
        phi_q.to(v.dtype), v, phi_k.to(v.dtype), None, log_decay, 1.0, scale, direction, order
    )


class ReGLAMixer(TokenMixer):
    """ReGLA over the tokens of a map.

        x = SiLU(conv(x))
        q, k, v = x W_Q, x W_K, x W_V
        g, r = sigmoid(x W_G + b_G), sigmoid(x W_R + b_R)
        F = (1 - r) g^2 + r (1 - (1 - g)^2)
        S_t = diag(F_t) S_{t-1} + exp(k_t - m) v_t^T              per head
        o_t = S_t^T exp(q_t - max q_t) / (e sqrt(K (e^2 - 1)))
        y = LayerNorm_head(o) W_O

    m is a maximum over the keys of the head, see exponential_features; the norm takes it, the
    maximum of q and the scale away but for its eps.

    Source: ReGLA, arXiv 2502.01578. Of its text section 3, the method, was not at hand: features,
    scale and F are second hand, from a note and a third party's code, which agree. Decided here,
    as no text at hand settles it: F decays keys, as in GLA, on whose kernels the authors say they
    build (both second-hand sources decay values); gates of full rank from x (the code: from v);
    start b_G = b_R = 0, F = 1/2, the code's; the norm by head and without weights, which W_O would
    take in; no output gate. Differs for vision: the convolution (none is published), any
    direction and scan order; in one direction m runs along the scan, as the code's does in
    inference, and takes the state along.

    Args:
        dim, num_heads, conv, direction, scans: see TokenMixer.
        gate_bias: start of b_G; the larger, the longer the memory at the start.
        refine: False leaves r out: F = g, the paper's ablation.
        rope: turn the features of queries and keys by their position, see rope2d; needs K
            divisible by 4.
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
        gate_bias: float = 0.0,
        refine: bool = True,
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, **dd)
        if not abs(gate_bias) <= 1e4:  # what float16 holds
            raise ValueError(f"gate_bias must be a number from -1e4 to 1e4, got {gate_bias}")
        self.dim = dim
        self.width = dim // num_heads
        check_widths(self.width, self.width, num_heads)
        self.rope = check_rope(rope, self.width, dim, num_heads)
        self.refine = bool(refine)
        self.num_gates = 2 if refine else 1
        self.gate_start = float(gate_bias)
        self.scale = variance_scale(self.width)
        self.norm_eps = 1e-5
        # Rows of W_Q, W_K, W_V, W_G and W_R: one product instead of five.
        self.in_proj = nn.Linear(dim, (3 + self.num_gates) * dim, bias=False, **dd)
        self.gate_bias = nn.Parameter(torch.empty(self.num_gates * dim, **dd))
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        with torch.no_grad():
            self.gate_bias.zero_()
            self.gate_bias[: self.dim].fill_(self.gate_start)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K, D = Gh * Gw, self.num_heads, self.width, self.num_gates
        q, k, v, gates = self.in_proj(self.conv(x).reshape(B, N, C)).split([C, C, C, D * C], dim=2)
        gates = (gates + self.gate_bias).reshape(B, N, D, H, K)
        refining: Tensor | None = gates[:, :, 1] if self.refine else None
        o = exponential_attention(
            q.reshape(B, N, H, K), k.reshape(B, N, H, K), v.reshape(B, N, H, K),
            refined_log_decay(gates[:, :, 0], refining), Gh, Gw, self.rope, self.scale,
            self.direction, token_order(x, self.scans, H),
        )  # fmt: skip
        y = F.layer_norm(o, [K], eps=self.norm_eps)
        return self.out_proj(y.reshape(B, Gh, Gw, C))
