"""LRU, the linear recurrent unit: a time-invariant diagonal state space model as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, D directions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from .mixer import TokenMixer
from .rotation import rotating_recurrence
from .scan import token_order

jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag


@register_notrace_function
def lru_states(
    into: Tensor, nu: Tensor, theta: Tensor, log_gain: Tensor, num_directions: int,
    direction: str, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """h [D, B, N, 2, C] of what enters [B, N, 2, C], with lambda = exp(-e^nu + i e^theta)."""
    B, N, _, C = into.shape
    dtype = torch.float64 if into.dtype == torch.float64 else torch.float32
    log_decay = (-nu.to(dtype).exp()).expand(B, N, C)
    phase = theta.to(dtype).exp().expand(num_directions, C)
    return rotating_recurrence(
        into.to(dtype) * log_gain.to(dtype).exp(), log_decay, phase, direction, order
    )


class LRUMixer(TokenMixer):
    """The linear recurrent unit over the tokens of a map, C complex states.

        x = SiLU(conv(x))
        lambda = exp(-e^nu + i e^theta)
        h_t = lambda h_{t-1} + e^(log_gain) (x_t W_B)            per channel, complex
        y_t = Re(h_t W_C) + D x_t                                W_C for each direction

    Source: LRU, arXiv 2303.06349, sections 3.2 to 3.4: lambda uniform on the ring between radii
    r_min and r_max, phases up to max_phase, and a gain that starts at sqrt(1 - |lambda|^2). Both
    directions as S5, arXiv 2208.04933, has them: the same lambda and W_B, a read-out each. Differs
    for vision: the convolution (none is published) and any scan order; the paper's GELU and gated
    linear unit are the backbone's channel mixer, and W_B and W_C start as the backbone's (0.02; the
    paper has (2 C)^-0.5 and C^-0.5). nu and theta are logarithms: in 16 bits, as after
    model.to(torch.bfloat16), phases are off by up to 0.02 a step; autocast keeps them.

    Args:
        dim, conv, direction: see TokenMixer.
        num_heads: groups of channels for several scans; nothing else.
        scans: as TokenMixer; several names divide the states among them.
        r_min, r_max: 0 <= r_min < r_max <= 1. max_phase: > 0, in radians.
        rope: not for this mixer: no queries.
    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        scans: str | Sequence[str] = "raster",
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, **dd)
        if rope:
            raise ValueError("pos_embed='rope2d' turns queries; LRU has none: none or sincos2d")
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"0 <= r_min < r_max <= 1 is needed, got {r_min} and {r_max}")
        if not max_phase > 0:
            raise ValueError(f"max_phase must be > 0, got {max_phase}")
        self.ring = (float(r_min), float(r_max), float(max_phase))
        self.num_directions = 2 if direction == "bidirectional" else 1
        self.nu = nn.Parameter(torch.empty(dim, **dd))
        self.theta = nn.Parameter(torch.empty(dim, **dd))
        self.log_gain = nn.Parameter(torch.empty(dim, **dd))
        self.skip = nn.Parameter(torch.empty(dim, **dd))
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.out_proj = nn.Linear(2 * self.num_directions * dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        r_min, r_max, max_phase = self.ring
        u_1, u_2 = torch.rand(2, len(self.nu), dtype=torch.float64)
        # Away from 0 and 1, where nu or the gain would be infinite
        radius2 = (u_1 * (r_max**2 - r_min**2) + r_min**2).clamp(1e-6, 1 - 1e-6)
        with torch.no_grad():
            self.nu.copy_((-0.5 * radius2.log()).log())
            self.theta.copy_((u_2.clamp_min(1e-4) * max_phase).log())
            self.log_gain.copy_(0.5 * torch.log1p(-radius2))
            nn.init.normal_(self.skip)

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the paper does not decay."""
        return {"nu", "theta", "log_gain", "in_proj.weight"}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N = Gh * Gw
        x_in = self.conv(x).reshape(B, N, C)
        into = self.in_proj(x_in).reshape(B, N, 2, C)
        h = lru_states(
            into, self.nu, self.theta, self.log_gain, self.num_directions, self.direction,
            token_order(x, self.scans, len(self.scans)),
        )  # fmt: skip
        # Re(h W_C) as one product over parts and directions; out_proj holds Re W_C and -Im W_C.
        states = h.permute(1, 2, 0, 3, 4).reshape(B, N, 2 * self.num_directions * C)
        y = self.out_proj(states.to(into.dtype)) + self.skip * x_in
        return y.reshape(B, Gh, Gw, C)
