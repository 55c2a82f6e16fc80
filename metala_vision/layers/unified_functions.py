"""The five functions of the gated linear attentions of the package: rows of MetaLA's unified table.

Written from the equations, out of each mixer's own parameters; the mixers' code has no part in it.
A new family is one class here, or in unified_channels.py, and its line in unified_instances.py.

B batch, Gh x Gw the token grid, C width, H heads, K key width and V value width per head, w the
pass: 0 from the first token on, 1 from the last.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .pos_embed import rope2d
from .scan import inverse, token_order, visit
from .unified import HeadNorm, Normaliser


class Instance:
    """A mixer of the package as functions of the (convolved) map x [B, Gh, Gw, C].

    formulas: f_q, f_k, f_v, f_alpha, f_g and the norm, as docs/unified.md prints them.
    lower_bound: the least decay [C] of this layer, for the mixers that take one.
    """

    formulas: ClassVar[tuple[str, str, str, str, str, str]]

    def __init__(self, mixer: Any, lower_bound: Tensor | None = None) -> None:
        self.mixer = mixer
        self.lower_bound = lower_bound

    def query(self, x: Tensor, way: int) -> Any:
        return 1.0

    def key(self, x: Tensor, way: int) -> Any:
        return 1.0

    def value(self, x: Tensor, way: int) -> Any:
        raise NotImplementedError  # every mixer has values

    def decay(self, x: Tensor, way: int) -> Any:
        return 1.0

    def forgetting(self, x: Tensor, way: int) -> Any:
        """The decay without what merely rescales a state."""
        return self.decay(x, way)

    def gate(self, x: Tensor, way: int) -> Any:
        return 1.0

    def options(self) -> dict[str, Any]:
        """What UnifiedMixer takes beside the functions."""
        return {}

    def rows(self, x: Tensor, start: int, count: int) -> Tensor:
        """x times the transposed rows start ... start + count - 1 of in_proj, with their biases."""
        own = self.mixer.in_proj
        part = slice(start, start + count)
        return F.linear(x, own.weight[part], None if own.bias is None else own.bias[part])

    def turned(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, H * K] as heads, turned by row and column where the mixer does."""
        x = x.unflatten(3, (self.mixer.num_heads, -1))
        if not self.mixer.rope:
            return x
        return rope2d(x.flatten(1, 2), x.shape[1], x.shape[2]).reshape(x.shape)

    def kept(self, gate: Tensor) -> Tensor:
        """1 - (1 - gamma) sigmoid(-gate), gamma the lower bound."""
        return 1.0 - self.lost(gate)

    def lost(self, gate: Tensor) -> Tensor:
        """(1 - gamma) sigmoid(-gate)."""
        lost = torch.sigmoid(-gate)
        return lost if self.lower_bound is None else lost * (1.0 - self.lower_bound)


class MetaLA(Instance):
    """The self-augmentation is what a token adds to its own output, by queries not turned."""

    formulas = (
        "K^-1/2 x W", "1 - alpha", "x W", "sigmoid(x W)^(1/tau)", "SiLU(x W + b)", "LayerNorm, head"
    )  # fmt: skip

    def log_decay(self, x: Tensor, way: int) -> Tensor:
        m = self.mixer
        half = m.num_heads * m.key_width
        gate = self.rows(x, half * (1 + min(way, m.num_decays - 1)), half)
        return F.logsigmoid(gate) / m.gate_divisor

    def plain_key(self, x: Tensor, way: int) -> Tensor:
        m = self.mixer
        half = m.num_heads * m.key_width
        if m.projected_key:
            return self.rows(x, half * (1 + m.num_decays), half)
        return -torch.expm1(self.log_decay(x, way))

    def query(self, x: Tensor, way: int) -> Tensor:
        m = self.mixer
        return m.key_width**-0.5 * self.turned(self.rows(x, 0, m.num_heads * m.key_width))

    def key(self, x: Tensor, way: int) -> Tensor:
        return self.turned(self.plain_key(x, way))

    def value(self, x: Tensor, way: int) -> Tensor:
        C = x.shape[3]
        return self.rows(x, self.mixer.in_proj.out_features - 2 * C, C)

    def decay(self, x: Tensor, way: int) -> Tensor:
        return self.log_decay(x, way).exp()

    def gate(self, x: Tensor, way: int) -> Tensor:
        C = x.shape[3]
        own = self.rows(x, self.mixer.in_proj.out_features - C, C)
        return F.silu(own + self.mixer.output_gate_bias)

    def augmentation(self, x: Tensor) -> Tensor:
        """tanh(q . (w_aug * k) v / 2) / 2, the sigmoid less its half, which the norm takes away."""
        m = self.mixer
        heads = (m.num_heads, m.key_width)
        q = self.rows(x, 0, m.num_heads * m.key_width).unflatten(3, heads)
        k = self.plain_key(x, 0).unflatten(3, heads)
        v = self.value(x, 0).unflatten(3, (m.num_heads, -1))
        return torch.tanh((q * m.w_aug * k).sum(4, keepdim=True) * v / 2) / 2

    def options(self) -> dict[str, Any]:
        norm = HeadNorm("layer", self.mixer.norm_eps)
        return {"norm": norm, "direct": self.augmentation if self.mixer.self_aug else None}


class GLA(Instance):
    formulas = (
        "K^-1/2 x W", "x W", "x W", "sigmoid(x W_1 W_2 + b)^(1/tau)", "SiLU(x W + b)",
        "LayerNorm, head",
    )  # fmt: skip

    def query(self, x: Tensor, way: int) -> Tensor:
        return self.mixer.scale * self.turned(self.rows(x, 0, x.shape[3] // 2))

    def key(self, x: Tensor, way: int) -> Tensor:
        return self.turned(self.rows(x, x.shape[3] // 2, x.shape[3] // 2))

    def value(self, x: Tensor, way: int) -> Tensor:
        return self.rows(x, x.shape[3], x.shape[3])

    def decay(self, x: Tensor, way: int) -> Tensor:
        m = self.mixer
        gates = m.decay_proj(self.rows(x, 3 * x.shape[3], m.rank)).chunk(m.num_decays, 3)
        return (F.logsigmoid(gates[min(way, m.num_decays - 1)]) / m.gate_divisor).exp()

    def gate(self, x: Tensor, way: int) -> Tensor:
        return F.silu(self.rows(x, 2 * x.shape[3], x.shape[3]) + self.mixer.output_gate_bias)

    def options(self) -> dict[str, Any]:
        return {"norm": HeadNorm(self.mixer.norm, self.mixer.norm_eps)}


class HGRN2(Instance):
    formulas = (
        "sigmoid(x W + b)", "1 - alpha", "SiLU(x W + b)",
        "gamma + (1 - gamma) sigmoid(x W + b)", "1", "LayerNorm, all",
    )  # fmt: skip

    def query(self, x: Tensor, way: int) -> Tensor:
        return self.turned(torch.sigmoid(self.rows(x, 0, x.shape[3])))

    def key(self, x: Tensor, way: int) -> Tensor:
        return self.turned(self.lost(self.rows(x, x.shape[3], x.shape[3])))

    def value(self, x: Tensor, way: int) -> Tensor:
        return F.silu(self.rows(x, 2 * x.shape[3], x.shape[3]))

    def decay(self, x: Tensor, way: int) -> Tensor:
        return self.kept(self.rows(x, x.shape[3], x.shape[3]))

    def norm(self, o: Tensor) -> Tensor:
        return self.mixer.norm(o.flatten(2))

    def options(self) -> dict[str, Any]:
        return {"norm": self.norm}


class ReGLA(Instance):
    """m is the greatest key of the head: of all tokens, or in one direction of those visited so
    far, and the decay then takes the state from one m to the next."""

    formulas = (
        "exp(x W - max) / (e (K (e^2 - 1))^1/2)", "exp(x W - m)", "x W",
        "(1 - r) g^2 + r (1 - (1 - g)^2), g, r = sigmoid(x W + b)", "1", "LayerNorm, head",
    )  # fmt: skip

    def heads(self, x: Tensor, start: int) -> Tensor:
        return self.rows(x, start, x.shape[3]).unflatten(3, (self.mixer.num_heads, -1))

    def greatest(self, x: Tensor, before: bool) -> Tensor:
        """m of each token, or of the token visited before it, the first one's own:
        [B, Gh, Gw, H, 1]."""
        m, keys = self.mixer, self.heads(x, x.shape[3])
        if m.direction == "bidirectional":
            return keys.amax((1, 2, 4), keepdim=True)
        top = keys.amax(4, keepdim=True).flatten(1, 2)  # [B, N, H, 1]
        order = token_order(x, m.scans, m.num_heads)
        top = top if order is None else visit(top, order)
        top = top.flip(1) if m.direction == "backward" else top
        top = top.cummax(1).values
        top = torch.cat([top[:, :1], top[:, :-1]], 1) if before else top
        top = top.flip(1) if m.direction == "backward" else top
        top = top if order is None else visit(top, inverse(order))
        return top.unflatten(1, x.shape[1:3])

    def query(self, x: Tensor, way: int) -> Tensor:
        q = self.heads(x, 0)
        scale = 1 / (math.e * math.sqrt(q.shape[4] * (math.e**2 - 1)))
        return scale * self.turned((q - q.amax(4, keepdim=True)).exp().flatten(3))

    def key(self, x: Tensor, way: int) -> Tensor:
        k = (self.heads(x, x.shape[3]) - self.greatest(x, before=False)).exp()
        return self.turned(k.flatten(3))

    def value(self, x: Tensor, way: int) -> Tensor:
        return self.rows(x, 2 * x.shape[3], x.shape[3])

    def forgetting(self, x: Tensor, way: int) -> Tensor:
        C, bias = x.shape[3], self.mixer.gate_bias
        g = torch.sigmoid(self.rows(x, 3 * C, C) + bias[:C])
        if self.mixer.refine:
            r = torch.sigmoid(self.rows(x, 4 * C, C) + bias[C:])
            g = (1 - r) * g**2 + r * (1 - (1 - g) ** 2)
        return g

    def decay(self, x: Tensor, way: int) -> Tensor:
        g = self.forgetting(x, way)
        rescaled = (self.greatest(x, before=True) - self.greatest(x, before=False)).exp()
        return g.unflatten(3, (self.mixer.num_heads, -1)) * rescaled

    def options(self) -> dict[str, Any]:
        return {"norm": HeadNorm("layer", self.mixer.norm_eps)}


class RetNet(Instance):
    """The rotation along the scan is the phase of a complex decay, as in the paper's table: pairs
    of channels are K / 2 complex ones, the keys conjugate, and the phase changes its sign with the
    pass. Without it, all is real."""

    formulas = (
        "K^-1/2 x W", "x W", "x W", "gamma_h e^(+-i theta), fixed", "SiLU(x W)", "LayerNorm, head"
    )  # fmt: skip

    def _pairs(self, x: Tensor) -> Tensor:
        x = x.unflatten(4, (-1, 2)).contiguous()
        return torch.view_as_complex(x if x.dtype == torch.float64 else x.float())

    def query(self, x: Tensor, way: int) -> Tensor:
        m, C = self.mixer, x.shape[3]
        q = m.key_width**-0.5 * self.turned(self.rows(x, 0, C))
        return self._pairs(q) if m.rotary else q

    def key(self, x: Tensor, way: int) -> Tensor:
        k = self.turned(self.rows(x, x.shape[3], x.shape[3]))
        return self._pairs(k).conj() if self.mixer.rotary else k

    def value(self, x: Tensor, way: int) -> Tensor:
        return self.rows(x, 2 * x.shape[3], self.mixer.num_heads * self.mixer.value_width)

    def decay(self, x: Tensor, way: int) -> Tensor:
        m = self.mixer
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        gamma = torch.tensor(m.log_decays, dtype=dtype, device=x.device).exp()[:, None]  # [H, 1]
        if not m.rotary:
            return gamma[None, None, None]
        i = torch.arange(m.key_width // 2, dtype=dtype, device=x.device)
        theta = 10000.0 ** (-i / max(m.key_width // 2 - 1, 1))
        sign = -1.0 if way == 1 else 1.0
        shape = (m.num_heads, len(theta))
        return torch.polar(gamma.expand(shape), sign * theta.expand(shape))[None, None, None]

    def gate(self, x: Tensor, way: int) -> Tensor:
        width = self.mixer.num_heads * self.mixer.value_width
        return F.silu(self.rows(x, 2 * x.shape[3] + width, width))

    def options(self) -> dict[str, Any]:
        return {"norm": HeadNorm(self.mixer.norm, self.mixer.norm_eps)}


class LinearAttention(Instance):
    """Each token is heard of once; the row sum that divides is of features that are not turned."""

    formulas = ("phi(x W)", "phi(x W)", "x W", "1", "1", "row sum, a second accumulator")

    def features(self, x: Tensor, start: int) -> Tensor:
        x = self.rows(x, start, x.shape[3])
        return F.elu(x) + 1 if self.mixer.elu else F.relu(x)

    def query(self, x: Tensor, way: int) -> Tensor:
        return self.turned(self.features(x, 0))

    def key(self, x: Tensor, way: int) -> Tensor:
        return self.turned(self.features(x, x.shape[3]))

    def value(self, x: Tensor, way: int) -> Tensor:
        return self.rows(x, 2 * x.shape[3], x.shape[3])

    def weighing_query(self, x: Tensor, way: int) -> Tensor:
        return self.features(x, 0)

    def weighing_key(self, x: Tensor, way: int) -> Tensor:
        return self.features(x, x.shape[3])

    def options(self) -> dict[str, Any]:
        normaliser = Normaliser(self.weighing_query, self.weighing_key, 1e-6)
        return {"once": True, "normaliser": normaliser}
