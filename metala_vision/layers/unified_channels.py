"""The five functions of the recurrences whose channels each have a state of their own.

Written from the equations, as unified_functions.py.

B batch, Gh x Gw the token grid, C width, H heads, E channels of Mamba, M its states a channel, w
the pass: 0 from the first token on, 1 from the last.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unified import WAYS
from .unified_functions import Instance


class HGRN(Instance):
    """C heads of one complex state. theta has a value for each pass."""

    formulas = (
        "1", "1 - \\|alpha\\|", "SiLU(x W + b) + i SiLU(x W' + b')",
        "(gamma + (1 - gamma) sigmoid(x W + b)) e^(i theta_w)", "SiLU(x W + b)",
        "LayerNorm, [Re o, Im o]",
    )  # fmt: skip

    def key(self, x: Tensor, way: int) -> Tensor:
        return self.lost(self.rows(x, 2 * x.shape[3], x.shape[3]))

    def value(self, x: Tensor, way: int) -> Tensor:
        re, im = F.silu(self.rows(x, 0, 2 * x.shape[3])).chunk(2, 3)
        return torch.complex(re, im)

    def decay(self, x: Tensor, way: int) -> Tensor:
        theta = self.mixer.theta[min(way, len(self.mixer.theta) - 1)]
        size = self.kept(self.rows(x, 2 * x.shape[3], x.shape[3]))
        return torch.polar(size, theta.to(size.dtype).expand(size.shape))

    def gate(self, x: Tensor, way: int) -> Tensor:
        return F.silu(self.rows(x, 3 * x.shape[3], 2 * x.shape[3]))

    def norm(self, o: Tensor) -> Tensor:
        o = o.squeeze(3)
        return self.mixer.norm(torch.cat([o.real, o.imag], 2))

    def options(self) -> dict[str, Any]:
        return {"norm": self.norm, "num_heads": self.mixer.dim}


class LRU(Instance):
    """C heads of one complex state; W_O reads Re and Im of each pass, and D x stands beside it."""

    formulas = ("1", "1", "e^gain (x W + i x W')", "exp(-e^nu + i e^theta), fixed", "1", "none")

    def value(self, x: Tensor, way: int) -> Tensor:
        gain = self.mixer.log_gain.exp()
        re, im = self.rows(x, 0, 2 * x.shape[3]).chunk(2, 3)
        return torch.complex(re * gain, im * gain)

    def decay(self, x: Tensor, way: int) -> Tensor:
        m = self.mixer
        decay = torch.polar((-m.nu.exp()).exp(), m.theta.exp())
        return decay[None, None, None, :, None]

    def norm(self, o: Tensor) -> Tensor:
        o = o.squeeze(3).unflatten(2, (self.mixer.num_directions, -1))  # [B, N, D, C]
        return torch.stack([o.real, o.imag], 3).flatten(2)

    def beside(self, x: Tensor) -> Tensor:
        return self.mixer.skip * x

    def options(self) -> dict[str, Any]:
        heads = len(self.mixer.nu)
        return {"norm": self.norm, "merge": "each", "beside": self.beside, "num_heads": heads}


class Mamba(Instance):
    """E heads of M states and one value; queries and keys are shared by the heads. x is the map
    before the convolution, u = SiLU(conv(x W)); skip * u is what a token adds to its own output."""

    formulas = (
        "u W", "step (u W')", "u", "exp(-step e^A), step = softplus(u W_1 W_2 + b)",
        "SiLU(x W) / passes", "none",
    )  # fmt: skip

    def way(self, way: int) -> Any:
        return self.mixer.ways[min(way, len(self.mixer.ways) - 1)]

    def value(self, x: Tensor, way: int) -> Tensor:
        return self.way(way).conv(self.rows(x, 0, self.mixer.width))

    def made(self, x: Tensor, way: int) -> tuple[Tensor, Tensor, Tensor]:
        """step [..., E], and k and q [..., M]."""
        own = self.way(way)
        r, k, q = own.x_proj(self.value(x, way)).split(own.sizes, dim=3)
        return F.softplus(F.linear(r, own.dt_weight) + own.dt_bias), k, q

    def query(self, x: Tensor, way: int) -> Tensor:
        return self.made(x, way)[2].unsqueeze(3)

    def key(self, x: Tensor, way: int) -> Tensor:
        step, k, _ = self.made(x, way)
        return step.unsqueeze(4) * k.unsqueeze(3)

    def decay(self, x: Tensor, way: int) -> Tensor:
        return torch.exp(-self.made(x, way)[0].unsqueeze(4) * self.way(way).A_log.exp())

    def gate(self, x: Tensor, way: int) -> Tensor:
        return self.mixer.scale * F.silu(self.rows(x, self.mixer.width, self.mixer.width))

    def skipped(self, x: Tensor) -> Tensor:
        passes = [self.way(w).skip * self.value(x, w) for w in WAYS[self.mixer.direction]]
        return torch.stack(passes).sum(0)

    def options(self) -> dict[str, Any]:
        m = self.mixer
        return {"conv": nn.Identity(), "direct": self.skipped, "num_heads": m.width}
