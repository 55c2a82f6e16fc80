"""The selective scan's forward pass on a GPU, and what both passes share.

B batch, N tokens, E channels, M states of a channel, D directions, BE channels and BM (>= M) states
of a tile, L steps in it, NT tiles in a segment, NS segments of a sequence. A step is a token in the
sequence that a direction visits them.

A program holds the states of BE channels in registers and walks along the steps: no product of
matrices, no scan among threads, and the states of single steps leave it nowhere. Tokens are read a
tile at a time, so that a tile's loads are under way together. Steps behind the last token bring
u = k = q = d_y = 0; their decay acts on states that no token sees.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch, log_decay_of, token_of

STEPS = 4  # of a tile: eight would not fit in registers in the backward pass
STATES_OF_A_TILE = 512  # BM x BE of one warp: 16 for each thread
TILES_OF_A_SEGMENT = 128  # at most: so many are one program's, and more are cut


class Call(NamedTuple):
    """One call; last dimensions contiguous, A, skip and bias contiguous and float32."""

    u: Tensor  # [D, B, N, E]
    delta: Tensor  # [D, B, N, E], raw
    A: Tensor  # [D, E, M]
    k: Tensor  # [D, B, N, M]
    q: Tensor  # [D, B, N, M]
    skip: Tensor | None  # [D, E]
    bias: Tensor | None  # [D, E]
    direction: str
    order: Tensor | None  # [N], contiguous

    @property
    def segments(self) -> tuple[int, int]:
        """Segments, and tiles in each: by N alone, so that a sample alone is as in a batch."""
        tiles = triton.cdiv(self.u.shape[2], STEPS)
        segments = triton.cdiv(tiles, TILES_OF_A_SEGMENT)
        return segments, triton.cdiv(tiles, segments)

    @property
    def constants(self) -> dict[str, Any]:
        """What both kernels are compiled for."""
        M = self.k.shape[3]
        BM = triton.next_power_of_2(M)
        return {
            "M": M, "BM": BM, "BE": min(32, STATES_OF_A_TILE // BM), "L": STEPS,
            "FIRST": int(self.direction == "backward"), "ORDER": self.order is not None,
            "SKIP": self.skip is not None, "BIAS": self.bias is not None,
            "DOT": "bf16" if self.u.itemsize == self.delta.itemsize == 2 else "ieee",
        }  # fmt: skip

    def scratch(self, *middle: int, states: bool = True) -> Tensor:
        """[D, B, *middle, M, E] or, of channels, [D, B, *middle, E]; float32, not written."""
        D, B, _, E = self.u.shape
        last = (self.k.shape[3], E) if states else (E,)
        return torch.empty((D, B, *middle, *last), dtype=torch.float32, device=self.u.device)


@triton.jit
def row(p, c, m):
    """p[c] in float32, 0 where m is false."""
    return tl.load(p + c, mask=m, other=0.0).to(tl.float32)


@triton.jit
def vector(p, c, m, GIVEN: tl.constexpr):
    """p[c], or zeros."""
    if GIVEN:
        return tl.load(p + c, mask=m, other=0.0)
    else:
        return tl.zeros([c.shape[0]], tl.float32)


@triton.jit
def log2_rates(p_A, e, n, E, M: tl.constexpr):
    """A / log 2 as [BM, BE], 0 beyond M and E."""
    m = (n < M)[:, None] & (e < E)[None, :]
    return tl.load(p_A + e[None, :] * M + n[:, None], mask=m, other=0.0) * 1.4426950408889634


@triton.jit
def softplus(x, DOT: tl.constexpr):
    """log(1 + exp(x)) to float32's precision, or with DOT "bf16" to 2^-14."""
    return -log_decay_of(-x, 1.0, DOT)


@triton.jit
def selective_scan_fwd_kernel(
    p_u, p_delta, p_A, p_k, p_q, p_skip, p_bias, p_order, p_out, p_entering, p_total,
    B, N, E, NS, NT,
    u_d, u_b, u_n, delta_d, delta_b, delta_n, k_d, k_b, k_n, q_d, q_b, q_n,
    M: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, L: tl.constexpr, FIRST: tl.constexpr,
    ORDER: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr,
    ENTERING: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """One program per (direction, sample, segment, tile of channels).

    FIRST: 0 if the first direction is forward, 1 if backward. ENTERING: p_entering [D, B, NS, M, E]
    enters each segment, else 0. OUT, what is written:
        "y"        y [D, B, N, E], contiguous
        "states"   what enters each tile [D, B, NS * NT, M, E], float32
        "segments" what each segment adds to a state of 0 [D, B, NS, M, E], and to p_total
                   [D, B, NS, E] the sum of its step sizes
    """
    i_program = tl.program_id(0).to(tl.int64)
    NE = (E + BE - 1) // BE
    i_s = (i_program // NE) % NS
    i_b = (i_program // (NE * NS)) % B
    i_d = i_program // (NE * NS) // B
    i_sample = i_d * B + i_b
    backward = (i_d + FIRST) == 1
    e = (i_program % NE) * BE + tl.arange(0, BE)
    n = tl.arange(0, BM)
    m_e, m_n = e < E, n < M
    m_state = m_n[:, None] & m_e[None, :]
    o_state = n[:, None] * E + e[None, :]
    p_u += i_d * u_d + i_b * u_b
    p_delta += i_d * delta_d + i_b * delta_b
    p_k += i_d * k_d + i_b * k_b
    p_q += i_d * q_d + i_b * q_b
    A = log2_rates(p_A + i_d * E * M, e, n, E, M)
    skip = vector(p_skip + i_d * E, e, m_e, SKIP)
    bias = vector(p_bias + i_d * E, e, m_e, BIAS)
    total = tl.zeros([BE], tl.float32)
    h = tl.zeros([BM, BE], tl.float32)
    if ENTERING:
        h = tl.load(p_entering + (i_sample * NS + i_s) * M * E + o_state, mask=m_state, other=0.0)
    for i in range(0, NT):
        i_tile = i_s * NT + i
        if OUT == "states":
            o_tile = (i_sample * NS * NT + i_tile) * M * E
            tl.store(p_out + o_tile + o_state, h, mask=m_state)
        us, raws, ks, qs = (), (), (), ()
        for j in tl.static_range(L):
            t, m = token_of(p_order, i_tile * L + j, N, backward, ORDER)
            us = us + (row(p_u + t * u_n, e, m_e & m),)
            raws = raws + (row(p_delta + t * delta_n, e, m_e & m),)
            ks = ks + (row(p_k + t * k_n, n, m_n & m),)
            if OUT == "y":
                qs = qs + (row(p_q + t * q_n, n, m_n & m),)
        for j in tl.static_range(L):
            t, m = token_of(p_order, i_tile * L + j, N, backward, ORDER)
            step = softplus(raws[j] + bias, DOT)
            h = tl.exp2(step[None, :] * A) * h + (step * us[j])[None, :] * ks[j][:, None]
            if OUT == "y":
                y = tl.sum(h * qs[j][:, None], 0) + skip * us[j]
                p_y = p_out + (i_sample * N + t) * E + e
                tl.store(p_y, y.to(p_out.dtype.element_ty), mask=m_e & m)
            if OUT == "segments":
                total += step
    if OUT == "segments":
        tl.store(p_out + (i_sample * NS + i_s) * M * E + o_state, h, mask=m_state)
        tl.store(p_total + (i_sample * NS + i_s) * E + e, total, mask=m_e)


def programs(call: Call) -> int:
    """Of either kernel."""
    D, B, _, E = call.u.shape
    return D * B * call.segments[0] * triton.cdiv(E, call.constants["BE"])


def forward_launch(
    call: Call, out: Tensor, kind: str, entering: Tensor | None = None, total: Tensor | None = None
) -> Launch:
    """One launch that writes `out`; kind and the rest as OUT and p_* above."""
    B, N, E = call.u.shape[1:]
    spare = call.A  # where a pointer is not used
    strides = [s for x in (call.u, call.delta, call.k, call.q) for s in x.stride()[:3]]
    given = [call.skip, call.bias, call.order, out, entering, total]
    arguments = (
        call.u, call.delta, call.A, call.k, call.q,
        *(spare if x is None else x for x in given), B, N, E, *call.segments, *strides,
    )  # fmt: skip
    constants = {**call.constants, "ENTERING": entering is not None, "OUT": kind}
    return Launch(selective_scan_fwd_kernel, programs(call), arguments, constants, 1)


def entering_launches(call: Call, edges: Any) -> tuple[Tensor | None, list[Any]]:
    """What enters each segment [D, B, NS, M, E], and what finds it; nothing for one segment.

    edges(added, total, entering, A, reverse): between two launches, makes what enters segments of
    what they add; reverse begins with the last one.
    """
    NS = call.segments[0]
    if NS == 1:
        return None, []
    added, entering, total = call.scratch(NS), call.scratch(NS), call.scratch(NS, states=False)
    return entering, [
        forward_launch(call, added, "segments", None, total),
        edges(added, total, entering, call.A, False),
    ]


def forward_launches(call: Call, dtype: torch.dtype, edges: Any) -> tuple[Tensor, list[Any]]:
    """y [D, B, N, E] in dtype, not yet written, and what writes it, one after the other."""
    y = torch.empty(call.u.shape, dtype=dtype, device=call.u.device)
    entering, launches = entering_launches(call, edges)
    return y, [*launches, forward_launch(call, y, "y", entering)]
