"""The linear recurrence on a GPU: one kernel for the states, one for the gradients.

B batch, N tokens, C channels of decay, M values that share one, D directions, BC channels of a
tile, L steps in it, NS segments of a sequence. A step is a token in the sequence that a direction
visits them: step i of the backward direction is token N - 1 - i, or order[N - 1 - i].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch, token_of

STEPS = 32  # of a tile
LONGEST_SEGMENT = 512  # steps: so many are one program's, and more are cut


@triton.jit
def then(a, h, a_later, h_later):
    """First h -> a h + (its own), then the later one: associative."""
    return a * a_later, a_later * h + h_later


@triton.jit
def rows(p, stride, t, m, c, C: tl.constexpr):
    """Rows t and channels c in float32, 0 where m is false."""
    p += t[:, None] * stride + c[None, :]
    return tl.load(p, mask=m[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def scanned(log_decay, h, carried):
    """The states of a tile's steps, and the one that leaves it; carried [BC] enters."""
    a, h = tl.associative_scan((tl.exp(log_decay), h), 0, then)
    h += a * carried[None, :]
    last = tl.arange(0, h.shape[0])[:, None] == h.shape[0] - 1
    return h, tl.sum(tl.where(last, h, 0.0), 0)


@triton.jit
def linear_recurrence_fwd_kernel(
    p_b, p_decay, p_order, p_h, p_entering, p_total,
    B, N, M, NS, NT,
    b_d, b_b, b_n, b_m, decay_b, decay_n,
    C: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr,
    ORDER: tl.constexpr, ENTERING: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """One program per (direction, sample, segment, value, tile of channels).

    h [D, B, N, M, C], contiguous. FIRST: 0 if the first direction is forward, 1 if backward.
    ENTERING: p_entering [D, B, NS, M, C] enters each segment, else 0. SUMMARY: instead of h, to
    p_entering what a segment adds to a state of 0, and to p_total [D, B, NS, C] its log decay.
    """
    i_program = tl.program_id(0).to(tl.int64)
    NC = (C + BC - 1) // BC
    i_c = i_program % NC
    i_m = (i_program // NC) % M
    i_s = (i_program // (NC * M)) % NS
    i_b = (i_program // (NC * M * NS)) % B
    i_d = i_program // (NC * M * NS) // B
    backward = (i_d + FIRST) == 1
    c = i_c * BC + tl.arange(0, BC)
    p_b += i_d * b_d + i_b * b_b + i_m * b_m
    p_decay += i_b * decay_b
    p_h += ((i_d * B + i_b) * N * M + i_m) * C
    o_segment = (i_d * B + i_b) * NS + i_s
    p_entering += (o_segment * M + i_m) * C + c
    carried = tl.zeros([BC], tl.float32)
    total = tl.zeros([BC], tl.float32)
    if ENTERING:
        carried = tl.load(p_entering, mask=c < C, other=0.0)
    for i in range(0, NT):
        step = (i_s * NT + i) * L + tl.arange(0, L)
        t, m = token_of(p_order, step, N, backward, ORDER)
        log_decay = rows(p_decay, decay_n, t, m, c, C)
        h, carried = scanned(log_decay, rows(p_b, b_n, t, m, c, C), carried)
        if SUMMARY:
            total += tl.sum(log_decay, 0)
        else:
            tl.store(p_h + t[:, None] * (M * C) + c[None, :], h.to(p_h.dtype.element_ty),
                     mask=m[:, None] & (c < C)[None, :])  # fmt: skip
    if SUMMARY:
        tl.store(p_entering, carried, mask=c < C)
        if i_m == 0:
            tl.store(p_total + o_segment * C + c, total, mask=c < C)


@triton.jit
def linear_recurrence_bwd_kernel(
    p_dh, p_h, p_decay, p_order, p_db, p_dlog, p_entering, p_total,
    B, N, M, NS, NT,
    dh_d, dh_b, dh_n, dh_m, decay_b, decay_n,
    C: tl.constexpr, BC: tl.constexpr, L: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr,
    ORDER: tl.constexpr, ENTERING: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """Gradients of b [D, B, N, M, C] and log_decay [D, B, N, C], from the last step on:

        g_i = d_h_i + a_{i+1} g_{i+1}          d_b_i = g_i          d_log_i = a_i sum_M g_i h_{i-1}

    One program per (direction, sample, segment, tile of channels), the values one after the other;
    SUMMARY and ENTERING as above, of g.
    """
    i_program = tl.program_id(0).to(tl.int64)
    NC = (C + BC - 1) // BC
    i_c = i_program % NC
    i_s = (i_program // NC) % NS
    i_b = (i_program // (NC * NS)) % B
    i_d = i_program // (NC * NS) // B
    backward = (i_d + FIRST) == 1
    c = i_c * BC + tl.arange(0, BC)
    p_decay += i_b * decay_b
    p_dlog += (i_d * B + i_b) * N * C
    o_segment = (i_d * B + i_b) * NS + i_s
    for value in range(0, M):
        i_m = tl.cast(value, tl.int64)
        p_in = p_dh + i_d * dh_d + i_b * dh_b + i_m * dh_m
        o_rows = ((i_d * B + i_b) * N * M + i_m) * C
        p_edge = p_entering + (o_segment * M + i_m) * C + c
        carried = tl.zeros([BC], tl.float32)
        total = tl.zeros([BC], tl.float32)
        if ENTERING:
            carried = tl.load(p_edge, mask=c < C, other=0.0)
        for i in range(0, NT):
            # Steps from the last on; the decay into g_i is that of the step before it, i + 1.
            step = N - 1 - (i_s * NT + i) * L - tl.arange(0, L)
            t, m = token_of(p_order, step, N, backward, ORDER)
            t_later, m_later = token_of(p_order, step + 1, N, backward, ORDER)
            t_before, m_before = token_of(p_order, step - 1, N, backward, ORDER)
            m_later = m_later & m
            log_later = rows(p_decay, decay_n, t_later, m_later, c, C)
            g, carried = scanned(log_later, rows(p_in, dh_n, t, m, c, C), carried)
            if SUMMARY:
                total += tl.sum(log_later, 0)
            else:
                inside = m[:, None] & (c < C)[None, :]
                o_t = t[:, None] * (M * C) + c[None, :]
                tl.store(p_db + o_rows + o_t, g.to(p_db.dtype.element_ty), mask=inside)
                h = rows(p_h + o_rows, M * C, t_before, m_before & m, c, C)
                d_log = g * h * tl.exp(rows(p_decay, decay_n, t, m, c, C))
                p_out = p_dlog + t[:, None] * C + c[None, :]
                if i_m > 0:
                    # Another thread may have written it: barrier at the end of a value's pass.
                    d_log += tl.load(p_out, mask=inside, other=0.0)
                tl.store(p_out, d_log, mask=inside)
        if SUMMARY:
            tl.store(p_edge, carried, mask=c < C)
            if i_m == 0:
                tl.store(p_total + o_segment * C + c, total, mask=c < C)
        tl.debug_barrier()


def _cut(N: int) -> tuple[int, int]:
    """Segments, and tiles in each."""
    tiles = triton.cdiv(N, STEPS)
    segments = triton.cdiv(tiles, LONGEST_SEGMENT // STEPS)
    return segments, triton.cdiv(tiles, segments)


def _constants(C: int, direction: str, order: Tensor | None) -> dict[str, Any]:
    BC = min(max(16, triton.next_power_of_2(C)), 64)
    return {
        "C": C, "BC": BC, "L": STEPS, "FIRST": int(direction == "backward"),
        "D": 2 if direction == "bidirectional" else 1, "ORDER": order is not None,
    }  # fmt: skip


def forward_launches(
    b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None, edges: Any
) -> tuple[Tensor, list[Any]]:
    """h [D, B, N, M, C], not yet written, and what writes it, to be run one after the other.

    b [B, N, M, C] or [2, B, N, M, C]. edges(added, total, entering): between two launches, makes
    what enters segments of what they add.
    """
    B, N, M, C = b.shape[-4:]
    constants = _constants(C, direction, order)
    D, (NS, NT) = constants["D"], _cut(N)
    h = torch.empty((D, B, N, M, C), dtype=b.dtype, device=b.device)
    b_d = b.stride(0) if b.dim() == 5 else 0
    tail = (
        B, N, M, NS, NT, b_d, *b.stride()[-4:-1], *log_decay.stride()[:2],
    )  # fmt: skip
    first = (b, log_decay, b if order is None else order, h)
    programs = D * B * NS * M * triton.cdiv(C, constants["BC"])

    def launch(entering: Tensor, total: Tensor, *, given: bool, summary: bool) -> Launch:
        return Launch(
            linear_recurrence_fwd_kernel, programs, (*first, entering, total, *tail),
            {**constants, "ENTERING": given, "SUMMARY": summary}, 4,
        )  # fmt: skip

    if NS == 1:
        return h, [launch(h, h, given=False, summary=False)]
    added = b.new_empty((D, B, NS, M, C), dtype=torch.float32)
    entering = torch.empty_like(added)
    total = b.new_empty((D, B, NS, C), dtype=torch.float32)
    return h, [
        launch(added, total, given=False, summary=True),
        edges(added, total, entering),
        launch(entering, total, given=True, summary=False),
    ]


def backward_launches(
    d_h: Tensor, h: Tensor, log_decay: Tensor, direction: str, order: Tensor | None, edges: Any
) -> tuple[Tensor, Tensor, list[Any]]:
    """Gradients of b by direction [D, B, N, M, C] and of log_decay by direction [D, B, N, C]."""
    D, B, N, M, C = h.shape
    constants = _constants(C, direction, order)
    NS, NT = _cut(N)
    d_b = torch.empty_like(h)
    d_log = h.new_empty((D, B, N, C), dtype=torch.float32)
    tail = (B, N, M, NS, NT, *d_h.stride()[:4], *log_decay.stride()[:2])
    first = (d_h, h, log_decay, h if order is None else order, d_b, d_log)
    programs = D * B * NS * triton.cdiv(C, constants["BC"])

    def launch(entering: Tensor, total: Tensor, *, given: bool, summary: bool) -> Launch:
        return Launch(
            linear_recurrence_bwd_kernel, programs, (*first, entering, total, *tail),
            {**constants, "ENTERING": given, "SUMMARY": summary}, 4,
        )  # fmt: skip

    if NS == 1:
        return d_b, d_log, [launch(d_log, d_log, given=False, summary=False)]
    added = h.new_empty((D, B, NS, M, C), dtype=torch.float32)
    entering = torch.empty_like(added)
    total = h.new_empty((D, B, NS, C), dtype=torch.float32)
    return (
        d_b,
        d_log,
        [
            launch(added, total, given=False, summary=True),
            edges(added, total, entering),
            launch(entering, total, given=True, summary=False),
        ],
    )
