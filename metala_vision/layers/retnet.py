"""Retention, linear attention with a constant decay per head, as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads, K = C / H
key width per head, V value width per head, h a head, l a layer of L.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from metala_vision.kernels._portable import may_keep
from metala_vision.kernels.gated_linear_attention import gated_linear_attention_op
from metala_vision.kernels.gated_norm import NORMS, gated_norm_op

from .mixer import TokenMixer, check_option, check_rope, check_widths
from .pos_embed import rope2d
from .scan import inverse, token_order

DECAYS = ("retnet", "transnormer")
ROTARY = ("scan", "none")


def retention_log_decay(name: str, num_heads: int, layer: int, depth: int) -> list[float]:
    """log gamma of each head.

        retnet       gamma_h = 1 - 2^(-5 - h), h = 0 ... H - 1, the same in all layers
        transnormer  gamma_h = exp(-s_h (1 - l / (L - 1) + 1e-5)), s_h the slopes of ALiBi

    Source: RetNet, arXiv 2307.08621, equation 8; TransNormerLLM, arXiv 2307.14995, as released by
    its authors; slopes: ALiBi, arXiv 2108.12409.
    """
    if name == "retnet":
        return [math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)]

    def slopes(count: int) -> list[float]:
        if count & (count - 1) == 0:
            return [2.0 ** (-8 * (h + 1) / count) for h in range(count)]
        lower = 1 << (count.bit_length() - 1)
        return slopes(lower) + slopes(2 * lower)[0::2][: count - lower]

    strength = 1 - layer / max(depth - 1, 1) + 1e-5
    return [-slope * strength for slope in slopes(num_heads)]


@register_notrace_function
def constant_decay(log_decays: list[float], q: Tensor) -> Tensor:
    """The log decay of each head [H] for all of q [B, N, H, K]: a view, in float32 at least."""
    K = q.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if torch.jit.is_scripting():
        return _filled(log_decays, K, dtype, q.device).expand(q.shape)
    else:
        if may_keep(q):
            return _kept(tuple(log_decays), K, dtype, q.device).expand(q.shape)
        return _filled(log_decays, K, dtype, q.device).expand(q.shape)


def _filled(values: list[float], K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H, K], filled on the device: a copy from the host would wait, and break a CUDA graph."""
    return torch.stack([torch.full((K,), value, dtype=dtype, device=device) for value in values])


@lru_cache(maxsize=128)
def _kept(values: Any, K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        return _filled(list(values), K, dtype, device)


@register_notrace_function
def rope_along(q: Tensor, k: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k [B, N, H, K], pairs of channels turned by t theta at step t of the scan.

    theta_i = 10000^(-i / (K / 2 - 1)): the product of two turned vectors depends on how many steps
    lie between them. Source: RetNet, arXiv 2307.08621, equation 5, with its authors' angles.
    """
    N, K = q.shape[1], q.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    theta = 10000.0 ** (-torch.arange(K // 2, device=q.device).to(dtype) / max(K // 2 - 1, 1))
    step = torch.arange(N, device=q.device).unsqueeze(1)  # [N, 1] or, below, [N, H]
    if order is not None:
        step = inverse(order).reshape(-1, N).t()
    angle = step.to(dtype).unsqueeze(2) * theta  # [N, 1 or H, K / 2]
    return _turned(q, angle.cos(), angle.sin()), _turned(k, angle.cos(), angle.sin())


def _turned(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = q[..., 0::2].to(cos.dtype), q[..., 1::2].to(cos.dtype)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], 4)
    return turned.reshape(q.shape).to(q.dtype)


class RetNetMixer(TokenMixer):
    """Retention over the tokens of a map.

        x = SiLU(conv(x))
        q, k, v, g = x W_Q, x W_K, x W_V, x W_G
        q_t, k_t turned by t theta along the scan
        S_t = gamma_h S_{t-1} + k_t v_t^T                        per head
        o_t = K^-0.5 S_t^T q_t
        y = (norm_head(o) * SiLU(g)) W_O

    Source: RetNet, arXiv 2307.08621, equations 5 to 8; no bias anywhere, as in its authors' code,
    whose norm is "rms". Differs for vision: the convolution (none is published), any direction and
    scan order, and V = K, so that the size is that of the others (published: V = 2 K or 5 / 3 K).
    The published row normalisers are left out: the norm takes them away. RMT, arXiv 2309.11523, is
    a softmax attention and another model.

    Args:
        dim, num_heads, conv, direction, scans: see TokenMixer.
        value_ratio: V / K.
        decay: "retnet" or "transnormer", see retention_log_decay.
        layer, depth: this layer's place, for decay="transnormer".
        rotary: "scan" turns queries and keys along the scan; "none" does not.
        norm: "layer" or "rms", per head.
        rope: turn queries and keys by row and column instead, see rope2d; K divisible by 4.
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
        value_ratio: int = 1,
        decay: str = "retnet",
        layer: int = 0,
        depth: int = 1,
        rotary: str = "scan",
        norm: str = "layer",
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, **dd)
        if value_ratio not in (1, 2, 3, 4):
            raise ValueError(f"value_ratio must be 1, 2, 3 or 4, got {value_ratio}")
        if not 0 <= layer < depth:
            raise ValueError(f"layer must be one of 0 ... depth - 1, got {layer} of {depth}")
        self.key_width = dim // num_heads
        self.value_width = value_ratio * self.key_width
        check_widths(self.key_width, self.value_width, num_heads)
        check_option("rotary", rotary, ROTARY)
        self.rotary = rotary == "scan" and not rope
        if self.rotary and self.key_width % 2:
            raise ValueError(
                f"rotary='scan' needs an even key width, got {self.key_width} "
                f"(dim={dim}, num_heads={num_heads})"
            )
        self.rope = check_rope(rope, self.key_width, dim, num_heads)
        self.norm = check_option("norm", norm, NORMS)
        self.norm_eps = 1e-5
        self.log_decays = retention_log_decay(
            check_option("decay", decay, DECAYS), num_heads, layer, depth
        )
        self.in_proj = nn.Linear(dim, 2 * dim + 2 * value_ratio * dim, bias=False, **dd)
        self.out_proj = nn.Linear(value_ratio * dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, _ = x.shape
        N, H, K, V = Gh * Gw, self.num_heads, self.key_width, self.value_width
        q, k, v, output_gate = self.in_proj(self.conv(x).reshape(B, N, -1)).split(
            [H * K, H * K, H * V, H * V], dim=2
        )
        q, k, v = q.reshape(B, N, H, K), k.reshape(B, N, H, K), v.reshape(B, N, H, V)
        order = token_order(x, self.scans, H)
        if self.rope:
            q, k = rope2d(q, Gh, Gw), rope2d(k, Gh, Gw)
        elif self.rotary:
            q, k = rope_along(q, k, order)
        o = gated_linear_attention_op(
            q, v, k, None, constant_decay(self.log_decays, q), 1.0, K**-0.5, self.direction, order
        )
        y = gated_norm_op(
            o, output_gate.reshape(B, N, H, V), None, None, None, None, None, None, 1.0, self.norm,
            self.norm_eps,
        )  # fmt: skip
        return self.out_proj(y.reshape(B, N, H * V)).reshape(B, Gh, Gw, -1)
