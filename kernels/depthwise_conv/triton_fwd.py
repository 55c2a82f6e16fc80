"""The depthwise convolution with SiLU on a GPU: the output, in one launch.

B batch, Gh x Gw the token grid, N = Gh * Gw, C width, Th x Tw taps. A tile is R tokens of a sample,
in raster order, and BC channels; a program owns several tiles of one block of channels. Channels
lie together, so every tap of a tile is a load of whole lines, and neighbouring taps load the same
ones: from memory x comes once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch

TILE = 1024  # elements of R x BC: 8 a thread, one vector of 16 bytes in 16 bits
CHANNELS = 64  # of a tile at most
PROGRAMS = 2048  # from here on a program takes more tiles, up to
TILES = 16
# Of a launch: with a constant for one tile a program, loops are unrolled and registers spill.
COUNTS = ["count", "per_program", "tiles"]


@triton.jit
def place(i, tiles, Gw, N, R: tl.constexpr):
    """Sample (int64), row and column [R] of the tile i, and which of its tokens there are."""
    n = (i % tiles) * R + tl.arange(0, R)
    return (i // tiles).to(tl.int64), n // Gw, n % Gw, n < N


@triton.jit
def rows_at(p, b, row, col, s_b, s_row, s_col, c):
    """Where the channels c of tokens (row, col) of the sample b lie, [R, BC]."""
    of_token = row.to(tl.int64) * s_row + col.to(tl.int64) * s_col
    return p + b * s_b + of_token[:, None] + c[None, :]


@triton.jit
def tap(p, i: tl.constexpr, row, col, s_row, s_col, Gh, Gw, top, left, m, m_c, Tw: tl.constexpr):
    """What tap i sees of x, in float32; 0 outside the grid and where there is no token or channel.
    p: of the tokens themselves."""
    down, right = i // Tw - top, i % Tw - left
    # Of numbers without sign, those below 0 are beyond the end too.
    m &= (row + down).to(tl.uint32, bitcast=True) < tl.cast(Gh, tl.uint32)
    m &= (col + right).to(tl.uint32, bitcast=True) < tl.cast(Gw, tl.uint32)
    p += tl.cast(down, tl.int64) * s_row + tl.cast(right, tl.int64) * s_col
    return tl.load(p, mask=m[:, None] & m_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def weights_of(p_w, c, C: tl.constexpr, TAPS: tl.constexpr, FLIP: tl.constexpr):
    """A tuple of [BC] in float32 from p_w [C, taps], the last tap first with FLIP: loaded once, as
    they would be two thirds of all that tiles load from the cache."""
    weights = ()
    for i in tl.static_range(TAPS):
        p = p_w + c * TAPS + (TAPS - 1 - i if FLIP else i)
        weights = weights + (tl.load(p, mask=c < C, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def convolved(
    p, weights, bias, row, col, s_row, s_col, Gh, Gw, top, left, m, m_c, TAPS: tl.constexpr,
    Tw: tl.constexpr,
):  # fmt: skip
    """z [R, BC] in float32. p: as for `tap`."""
    z = tl.zeros(p.shape, tl.float32) + bias[None, :]
    for i in tl.static_range(TAPS):
        x = tap(p, i, row, col, s_row, s_col, Gh, Gw, top, left, m, m_c, Tw)
        z += weights[i][None, :] * x
    return z


@triton.jit
def rows_out(p, b, row, col, N, Gw, c, C: tl.constexpr):
    """The same in a contiguous [B, N, C]."""
    N, Gw = tl.cast(N, tl.int64), tl.cast(Gw, tl.int64)
    return rows_at(p, b, row, col, N * C, Gw * C, C, c)


@triton.jit(do_not_specialize=COUNTS)
def depthwise_conv_fwd_kernel(
    p_x, p_w, p_bias, p_y,
    count, per_program, tiles, N, Gh, Gw, top, left, x_b, x_row, x_col,
    C: tl.constexpr, Th: tl.constexpr, Tw: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """y [B, N, C], contiguous. One program per (group of tiles, block of channels)."""
    blocks = tl.cdiv(C, BC)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    weights = weights_of(p_w, c, C, Th * Tw, FLIP)
    bias = tl.zeros([BC], tl.float32)
    if BIAS:
        bias = tl.load(p_bias + c, mask=c < C, other=0.0).to(tl.float32)
    first = (tl.program_id(0) // blocks) * per_program
    for i in range(first, tl.minimum(first + per_program, count)):
        b, row, col, m = place(i, tiles, Gw, N, R)
        p = rows_at(p_x, b, row, col, x_b, x_row, x_col, c)
        y = convolved(p, weights, bias, row, col, x_row, x_col, Gh, Gw, top, left, m, c < C,
                      Th * Tw, Tw)  # fmt: skip
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        p = rows_out(p_y, b, row, col, N, Gw, c, C)
        tl.store(p, y.to(p_y.dtype.element_ty), mask=m[:, None] & (c < C)[None, :])


class Call(NamedTuple):
    """The arguments of one call, as in reference.py."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    top: int
    left: int


def shapes_of(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Widths and taps, and the tile."""
    C, Th, Tw = weight.shape
    BC = min(CHANNELS, max(16, triton.next_power_of_2(C)))
    return {"C": C, "Th": Th, "Tw": Tw, "R": TILE // BC, "BC": BC}


def output_launch(call: Call, silu: bool = True) -> tuple[Tensor, Launch]:
    """What the taps give for call.x, not yet written, and the launch that writes it. Without silu
    the taps are taken from the last, as d_x needs them."""
    x, weight, bias, top, left = call
    B, Gh, Gw, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shapes = shapes_of(x, weight)
    tiles = triton.cdiv(Gh * Gw, shapes["R"])
    blocks = triton.cdiv(C, shapes["BC"])
    per_program = min(TILES, triton.cdiv(B * tiles * blocks, PROGRAMS))
    launch = Launch(
        depthwise_conv_fwd_kernel,
        triton.cdiv(B * tiles, per_program) * blocks,
        (
            x, weight.contiguous(), x if bias is None else bias.contiguous(), y,
            B * tiles, per_program, tiles, Gh * Gw, Gh, Gw, top, left, *x.stride()[:3],
        ),
        {**shapes, "BIAS": bias is not None, "SILU": silu, "FLIP": not silu},
        4,
    )  # fmt: skip
    return y, launch
