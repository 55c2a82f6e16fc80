"""HGRN, a gated elementwise recurrence with complex states, as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, D directions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lower_bound import bounded_log_decay
from .mixer import TokenMixer
from .rotation import rotating_recurrence
from .scan import token_order

jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag


class HGRNMixer(TokenMixer):
    """HGRN over the tokens of a map.

        x = SiLU(conv(x))
        c = SiLU(x W_re + b_re) + i SiLU(x W_im + b_im)
        f = gamma + (1 - gamma) sigmoid(x W_F + b_F)
        h_t = f_t e^(i theta) h_{t-1} + (1 - f_t) c_t            per channel and direction
        g = SiLU(x W_G + b_G)                                    [2 C]
        y = (LayerNorm([Re h, Im h]) * g) W_O

    The states of both directions are summed; they share c and f and have a theta each. gamma [C],
    the least decay of a layer, comes from the backbone and grows with depth (see LowerBounds).

    Source: HGRN, arXiv 2311.04823, section 3; norm before gate, SiLU for the gate and the start
    theta_j = 10000^(-2 j / C) are those of the authors' release. Differs for vision: the
    convolution (none is published) and any scan order. Decided here, as no text settles it: no bias
    on W_O.

    Args:
        dim, conv, direction: see TokenMixer.
        num_heads: groups of channels for several scans; nothing else.
        scans: as TokenMixer; several names divide the channels among them.
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
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, **dd)
        if rope:
            raise ValueError("pos_embed='rope2d' turns queries; HGRN has none: none or sincos2d")
        self.dim = dim
        num_directions = 2 if direction == "bidirectional" else 1
        # Rows of W_re, W_im, W_F and W_G (two): one product instead of five.
        self.in_proj = nn.Linear(dim, 5 * dim, **dd)
        self.theta = nn.Parameter(torch.empty(num_directions, dim, **dd))
        self.norm = nn.LayerNorm(2 * dim, eps=1e-5, **dd)
        self.out_proj = nn.Linear(2 * dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        j = torch.arange(self.dim, dtype=torch.float64)
        start = 10000.0 ** (-2 * j / self.dim)
        with torch.no_grad():
            self.theta.copy_(start.expand(self.theta.shape))

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW should not decay although they are matrices."""
        return {"theta"}

    def forward(self, x: Tensor, lower_bound: Tensor | None = None) -> Tensor:
        """x [B, Gh, Gw, C], lower_bound [C] (None is 0) -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N = Gh * Gw
        c, gate, g = self.in_proj(self.conv(x).reshape(B, N, C)).split([2 * C, C, 2 * C], dim=2)
        log_decay = bounded_log_decay(gate, lower_bound)
        lost = -torch.expm1(log_decay)
        u = F.silu(c).reshape(B, N, 2, C) * lost.unsqueeze(2)
        h = rotating_recurrence(
            u, log_decay, self.theta, self.direction, token_order(x, self.scans, len(self.scans))
        ).sum(0)
        y = self.norm(h.reshape(B, N, 2 * C).to(g.dtype)) * F.silu(g)
        return self.out_proj(y).reshape(B, Gh, Gw, C)
