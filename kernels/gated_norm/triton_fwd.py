"""The gated norm on a GPU: the output, in one launch.

B batch, N tokens, H heads, K key width per head, V value width per head; BK and BV powers of two
that hold them, R rows (tokens of any sample) in a tile.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch, key_of, log_decay_of, sigmoid, tile

TILE = 1024  # elements of R x BV: 8 a thread, one vector of 16 bytes in 16 bits


@triton.jit
def tanh(x):
    """To float32's precision for any x, near 0 too, from exp alone."""
    w = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - w) / (1.0 + w)
    # Its continued fraction below 5/8: what is left out is x^10 / (3 5 7 9)^2 / 11 < 2^-29
    y = x * x
    near = x / (1.0 + y / (3.0 + y / (5.0 + y / (7.0 + y * (1.0 / 9)))))
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def rows_of(i_tile, N, rows, R: tl.constexpr):
    """Sample and token of a tile's rows, int64 [R], and which of them there are."""
    r = i_tile.to(tl.int64) * R + tl.arange(0, R)
    return r // N, r % N, r < rows


@triton.jit
def key_and_slope(p_key, o_key, c_k, m, rate, K: tl.constexpr, KEY: tl.constexpr,
                  DOT: tl.constexpr):  # fmt: skip
    """Keys in float32, and their derivative by what p_key holds: keys, or with KEY "gate" raw
    gates."""
    if KEY == "gate":
        gate = tile(p_key, 1, o_key, c_k, m, K, 0.0).to(tl.float32)
        log_decay = log_decay_of(gate, rate, DOT)
        log_decay = tl.where(log_decay < -1e4, -1e4, log_decay)  # -inf times 0 would be NaN
        alpha = tl.exp(log_decay)
        return key_of(log_decay, alpha, DOT), -alpha * rate * sigmoid(-gate)
    else:
        k = tile(p_key, 1, o_key, c_k, m, K, 0.0).to(tl.float32)
        return k, tl.full(k.shape, 1.0, tl.float32)


@triton.jit
def normalised(x, c_v, eps, V: tl.constexpr, NORM: tl.constexpr):
    """norm(x) over the columns below V, and the factor that it took."""
    inside = (c_v < V)[None, :]
    if NORM == "layer":
        x = tl.where(inside, x - (tl.sum(x, 1) / V)[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) / V + eps)
    return x * factor[:, None], factor


@triton.jit
def gated_norm_fwd_kernel(
    p_o, p_gate, p_bias, p_v, p_q, p_key, p_w, p_y,
    rows, N, H, rate, eps,
    o_b, o_n, o_h, gate_b, gate_n, gate_h, v_b, v_n, v_h, q_b, q_n, q_h, key_b, key_n, key_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
    KEY: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y [B, N, H, V], contiguous: one program per (tile of rows, head).

    KEY: "none" without self-augmentation, "key", or "gate" for keys 1 - alpha.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_h = i_program % H
    b, n, m = rows_of(i_program // H, N, rows, R)
    c_k, c_v = tl.arange(0, BK), tl.arange(0, BV)
    x = tile(p_o, 1, b * o_b + n * o_n + i_h * o_h, c_v, m, V, 0.0).to(tl.float32)
    if KEY != "none":
        k, _ = key_and_slope(p_key, b * key_b + n * key_n + i_h * key_h, c_k, m, rate, K, KEY, DOT)
        q = tile(p_q, 1, b * q_b + n * q_n + i_h * q_h, c_k, m, K, 0.0).to(tl.float32)
        v = tile(p_v, 1, b * v_b + n * v_n + i_h * v_h, c_v, m, V, 0.0).to(tl.float32)
        w = tl.load(p_w + i_h * K + c_k, mask=c_k < K, other=0.0).to(tl.float32)
        half = 0.5 * tl.sum(q * k * w[None, :], 1)
        x += 0.5 * tanh(half[:, None] * v)
    normed, _ = normalised(x, c_v, eps, V, NORM)
    raw = tile(p_gate, 1, b * gate_b + n * gate_n + i_h * gate_h, c_v, m, V, 0.0).to(tl.float32)
    if BIAS:
        raw += tl.load(p_bias + i_h * V + c_v, mask=c_v < V, other=0.0).to(tl.float32)[None, :]
    y = normed * raw * sigmoid(raw)
    p_y += ((b * N + n) * H + i_h)[:, None] * V + c_v[None, :]
    tl.store(p_y, y.to(p_y.dtype.element_ty), mask=m[:, None] & (c_v < V)[None, :])


class Call(NamedTuple):
    """The arguments of one call, as in reference.py."""

    o: Tensor
    output_gate: Tensor
    bias: Tensor | None
    q: Tensor | None
    k: Tensor | None
    gate: Tensor | None
    v: Tensor | None
    w_aug: Tensor | None
    gate_divisor: float
    norm: str
    eps: float


def modes(
    bias: Tensor | None, q: Tensor | None, k: Tensor | None, gate: Tensor | None,
    w_aug: Tensor | None, norm: str,
) -> dict[str, Any]:  # fmt: skip
    """What of a kernel a call asks for. The key's series is float32's unless all it comes from has
    16 bits."""
    wide = any(x is not None and x.dtype == torch.float32 for x in (q, k, gate))
    return {
        "KEY": "none" if w_aug is None else "gate" if k is None else "key",
        "BIAS": bias is not None, "NORM": norm, "DOT": "ieee" if wide else "bf16",
    }  # fmt: skip


def shapes_of(o: Tensor, q: Tensor | None) -> dict[str, Any]:
    """Widths, and the tile that holds them."""
    V = o.shape[3]
    K = 1 if q is None else q.shape[3]
    BK, BV = (max(16, triton.next_power_of_2(x)) for x in (K, V))
    return {"K": K, "V": V, "BK": BK, "BV": BV, "R": max(1, TILE // max(BK, BV))}


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Of each over sample, token and head."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def forward_launch(call: Call) -> tuple[Tensor, Launch]:
    """The output, not yet written, and the launch that writes it."""
    o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps = call
    B, N, H, _ = o.shape
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    shapes = shapes_of(o, q)
    key = gate if k is None else k
    # In place of a tensor that is not there, one that is.
    v, q, key = (o if x is None else x for x in (v, q, key))
    bias_, w_aug_ = (o if x is None else x.contiguous() for x in (bias, w_aug))
    launch = Launch(
        gated_norm_fwd_kernel,
        triton.cdiv(B * N, shapes["R"]) * H,
        (
            o, output_gate, bias_, v, q, key, w_aug_, y,
            B * N, N, H, 1 / gate_divisor, eps, *strides_of(o, output_gate, v, q, key),
        ),
        {**shapes, **modes(bias, q, k, gate, w_aug, norm)},
        4,
    )  # fmt: skip
    return y, launch
