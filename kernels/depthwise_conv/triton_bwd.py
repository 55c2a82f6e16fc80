"""The depthwise convolution with SiLU on a GPU: the gradients, in two launches.

With s = sigmoid(z), which the first launch makes again from x,

    d_z = d_y s (1 + z (1 - s))
    d_weight_{r, s} = sum over tokens of d_z_{i, j} x_{i + r - top, j + s - left}
    d_x_{i, j} = sum over r, s of weight_{r, s} d_z_{i - r + top, j - s + left}

The first writes d_z, in x's dtype, and one row of sums over tokens per program, added up behind: no
atomic operations, so that every run gives the same bits. The second is the convolution of d_z by
the taps in reverse.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch
from metala_vision.kernels.depthwise_conv.triton_fwd import (
    COUNTS,
    Call,
    convolved,
    output_launch,
    place,
    rows_at,
    rows_out,
    shapes_of,
    tap,
    weights_of,
)

MAX_PARTS = 256  # rows of partial sums for a block of channels


@triton.jit(do_not_specialize=COUNTS)
def depthwise_conv_bwd_kernel(
    p_dy, p_x, p_w, p_bias, p_dz, p_dw, p_dbias,
    count, per_program, tiles, N, Gh, Gw, top, left,
    dy_b, dy_row, dy_col, x_b, x_row, x_col,
    C: tl.constexpr, Th: tl.constexpr, Tw: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
    BIAS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """d_z [B, N, C], contiguous, and with SUMS those of parts: p_dw [parts, C, taps] and p_dbias
    [parts, C], in float32. One program per (part, block of channels)."""
    blocks = tl.cdiv(C, BC)
    i_part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    weights = weights_of(p_w, c, C, Th * Tw, False)
    bias = tl.zeros([BC], tl.float32)
    if BIAS:
        bias = tl.load(p_bias + c, mask=c < C, other=0.0).to(tl.float32)
    d_weights = ()
    for _ in tl.static_range(Th * Tw if SUMS else 0):
        d_weights = d_weights + (tl.zeros([R, BC], tl.float32),)
    d_bias = tl.zeros([R, BC], tl.float32)
    for i_tile in range(i_part * per_program, tl.minimum((i_part + 1) * per_program, count)):
        b, row, col, m = place(i_tile, tiles, Gw, N, R)
        inside = m[:, None] & (c < C)[None, :]
        p = rows_at(p_x, b, row, col, x_b, x_row, x_col, c)
        z = convolved(p, weights, bias, row, col, x_row, x_col, Gh, Gw, top, left, m, c < C,
                      Th * Tw, Tw)  # fmt: skip
        d_y = tl.load(rows_at(p_dy, b, row, col, dy_b, dy_row, dy_col, c), mask=inside, other=0.0)
        s = 1.0 / (1.0 + tl.exp(-z))
        d_z = d_y.to(tl.float32) * s * (1.0 + z * (1.0 - s))
        d_bias += d_z
        sums = ()
        for i in tl.static_range(Th * Tw if SUMS else 0):
            x = tap(p, i, row, col, x_row, x_col, Gh, Gw, top, left, m, c < C, Tw)
            sums = sums + (d_weights[i] + d_z * x,)
        d_weights = sums
        p = rows_out(p_dz, b, row, col, N, Gw, c, C)
        tl.store(p, d_z.to(p_dz.dtype.element_ty), mask=inside)
    for i in tl.static_range(Th * Tw if SUMS else 0):
        p = p_dw + (i_part.to(tl.int64) * C + c) * Th * Tw + i
        tl.store(p, tl.sum(d_weights[i], 0), mask=c < C)
    if BIAS and SUMS:
        tl.store(p_dbias + i_part.to(tl.int64) * C + c, tl.sum(d_bias, 0), mask=c < C)


class Gradients(NamedTuple):
    """What the launches write: of x, and in float32 parts [parts, C, Th, Tw] and [parts, C]. None
    for what nobody needs or there is not."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def backward_launches(
    d_y: Tensor, call: Call, of_x: bool = True, of_taps: bool = True
) -> tuple[Gradients, list[Launch]]:
    """Gradients, not yet written, and the launches that write them, one after the other. of_x:
    that of x is needed, of_taps: those of weight and bias."""
    x, weight, bias, top, left = call
    B, Gh, Gw, C = x.shape
    _, Th, Tw = weight.shape
    shapes = shapes_of(x, weight)
    tiles = triton.cdiv(Gh * Gw, shapes["R"])
    blocks = triton.cdiv(C, shapes["BC"])
    per_program = triton.cdiv(B * tiles, MAX_PARTS)
    parts = triton.cdiv(B * tiles, per_program)
    d_z = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def part(t: Tensor | None) -> Tensor | None:
        if t is None or not of_taps:
            return None
        return torch.empty((parts, *t.shape), dtype=torch.float32, device=t.device)

    d_weight, d_bias = part(weight), part(bias)
    launches = [
        Launch(
            depthwise_conv_bwd_kernel,
            parts * blocks,
            (
                d_y, x, weight.contiguous(), x if bias is None else bias.contiguous(),
                d_z, d_z if d_weight is None else d_weight, d_z if d_bias is None else d_bias,
                B * tiles, per_program, tiles, Gh * Gw, Gh, Gw, top, left,
                *d_y.stride()[:3], *x.stride()[:3],
            ),
            {**shapes, "BIAS": bias is not None, "SUMS": of_taps},
            4,
        )
    ]  # fmt: skip
    d_x = None
    if of_x:
        turned = Call(d_z, weight, None, Th - 1 - top, Tw - 1 - left)
        d_x, launch = output_launch(turned, silu=False)
        launches.append(launch)
    return Gradients(d_x, d_weight, d_bias), launches
