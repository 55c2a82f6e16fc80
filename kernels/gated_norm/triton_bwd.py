"""The gated norm on a GPU: the gradients, in one launch. Letters: triton_fwd.py.

With n = norm(x) and f its factor, the gradient of x is f (d_n - mean(d_n) -
n mean(d_n n)), without the first mean for norm="rms"; the rest is the chain rule. What is summed
over all tokens (bias, w_aug) comes as one row per program, added up behind: no atomic operations,
so that every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch, sigmoid, tile
from metala_vision.kernels.gated_norm.triton_fwd import (
    Call,
    key_and_slope,
    modes,
    normalised,
    rows_of,
    shapes_of,
    strides_of,
    tanh,
)

MAX_PARTS = 256  # rows of partial sums for a head


@triton.jit
def store(p, x, b, n, N, H, i_h, c, m, C: tl.constexpr):
    """x [R, columns] into the contiguous tensor [B, N, H, C] at p."""
    p += ((b * N + n) * H + i_h)[:, None] * C + c[None, :]
    tl.store(p, x.to(p.dtype.element_ty), mask=m[:, None] & (c < C)[None, :])


@triton.jit
def gated_norm_bwd_kernel(
    p_dy, p_o, p_gate, p_bias, p_v, p_q, p_key, p_w,
    p_do, p_dgate, p_dbias, p_dv, p_dq, p_dkey, p_dw,
    rows, N, H, tiles, rate, eps,
    dy_b, dy_n, dy_h, o_b, o_n, o_h, gate_b, gate_n, gate_h, v_b, v_n, v_h, q_b, q_n, q_h,
    key_b, key_n, key_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
    KEY: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (part, head), of `tiles` tiles of rows. p_dbias [parts, H, V] and p_dw
    [parts, H, K] in float32."""
    i_program = tl.program_id(0).to(tl.int64)
    i_h = i_program % H
    i_part = i_program // H
    c_k, c_v = tl.arange(0, BK), tl.arange(0, BV)
    d_bias = tl.zeros([BV], tl.float32)
    d_w = tl.zeros([BK], tl.float32)
    bias = tl.zeros([BV], tl.float32)
    w = tl.zeros([BK], tl.float32)
    if BIAS:
        bias = tl.load(p_bias + i_h * V + c_v, mask=c_v < V, other=0.0).to(tl.float32)
    if KEY != "none":
        w = tl.load(p_w + i_h * K + c_k, mask=c_k < K, other=0.0).to(tl.float32)
    for i in range(0, tiles):
        b, n, m = rows_of(i_part * tiles + i, N, rows, R)
        x = tile(p_o, 1, b * o_b + n * o_n + i_h * o_h, c_v, m, V, 0.0).to(tl.float32)
        if KEY != "none":
            k, slope = key_and_slope(
                p_key, b * key_b + n * key_n + i_h * key_h, c_k, m, rate, K, KEY, DOT
            )
            q = tile(p_q, 1, b * q_b + n * q_n + i_h * q_h, c_k, m, K, 0.0).to(tl.float32)
            v = tile(p_v, 1, b * v_b + n * v_n + i_h * v_h, c_v, m, V, 0.0).to(tl.float32)
            half = 0.5 * tl.sum(q * k * w[None, :], 1)
            own = tanh(half[:, None] * v)
            x += 0.5 * own
        normed, factor = normalised(x, c_v, eps, V, NORM)
        raw = tile(p_gate, 1, b * gate_b + n * gate_n + i_h * gate_h, c_v, m, V, 0.0)
        raw = raw.to(tl.float32) + bias[None, :]
        d_y = tile(p_dy, 1, b * dy_b + n * dy_n + i_h * dy_h, c_v, m, V, 0.0).to(tl.float32)
        s = sigmoid(raw)
        d_raw = d_y * normed * s * (1.0 + raw * (1.0 - s))
        store(p_dgate, d_raw, b, n, N, H, i_h, c_v, m, V)
        d_bias += tl.sum(d_raw, 0)
        d_n = d_y * raw * s
        d_x = d_n - normed * (tl.sum(d_n * normed, 1) / V)[:, None]
        if NORM == "layer":
            d_x -= (tl.sum(d_n, 1) / V)[:, None]
        d_x = tl.where((c_v < V)[None, :], d_x * factor[:, None], 0.0)
        store(p_do, d_x, b, n, N, H, i_h, c_v, m, V)
        if KEY != "none":
            d_own = d_x * 0.5 * (1.0 - own * own)
            store(p_dv, d_own * half[:, None], b, n, N, H, i_h, c_v, m, V)
            d_half = 0.5 * tl.sum(d_own * v, 1)[:, None]
            store(p_dq, d_half * k * w[None, :], b, n, N, H, i_h, c_k, m, K)
            store(p_dkey, d_half * q * w[None, :] * slope, b, n, N, H, i_h, c_k, m, K)
            d_w += tl.sum(d_half * q * k, 0)
    if BIAS:
        tl.store(p_dbias + (i_part * H + i_h) * V + c_v, d_bias, mask=c_v < V)
    if KEY != "none":
        tl.store(p_dw + (i_part * H + i_h) * K + c_k, d_w, mask=c_k < K)


def backward_launch(d_y: Tensor, call: Call) -> tuple[dict[str, Tensor], Launch]:
    """Gradients by name, not yet written, and the launch that writes them; those of bias and w_aug
    in parts [parts, H, ...], in float32."""
    o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps = call
    B, N, H, _ = o.shape
    shapes = shapes_of(o, q)
    num_tiles = triton.cdiv(B * N, shapes["R"])
    tiles = triton.cdiv(num_tiles, MAX_PARTS)
    parts = triton.cdiv(num_tiles, tiles)
    key = gate if k is None else k

    def like(x: Tensor | None) -> Tensor:
        return o if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def part(x: Tensor | None) -> Tensor:
        return o if x is None else x.new_empty((parts, *x.shape), dtype=torch.float32)

    gradients = {
        "o": like(o), "output_gate": like(output_gate), "bias": part(bias), "v": like(v),
        "q": like(q), "gate" if k is None else "k": like(key), "w_aug": part(w_aug),
    }  # fmt: skip
    v, q, key = (o if x is None else x for x in (v, q, key))
    bias_, w_aug_ = (o if x is None else x.contiguous() for x in (bias, w_aug))
    launch = Launch(
        gated_norm_bwd_kernel,
        parts * H,
        (
            d_y, o, output_gate, bias_, v, q, key, w_aug_, *gradients.values(),
            B * N, N, H, tiles, 1 / gate_divisor, eps,
            *strides_of(d_y, o, output_gate, v, q, key),
        ),
        {**shapes, **modes(bias, q, k, gate, w_aug, norm)},
        4,
    )  # fmt: skip
    return gradients, launch
