"""The selective scan's gradients on a GPU. Letters as in triton_fwd.py, and

    a_i = exp(step_i A)          g_i = d h_i = d_y_i q_i + c_{i+1}          c_i = a_i g_i

The states are made again: first what enters each tile, by the forward kernel, then a tile's own.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch, decay_slope, token_of
from metala_vision.kernels.selective_scan.triton_fwd import (
    Call,
    entering_launches,
    forward_launch,
    log2_rates,
    programs,
    row,
    softplus,
    vector,
)


class Gradients(NamedTuple):
    """Parts [D, ..., B, ...] are sums over a segment or a tile of channels, still to be added."""

    d_u: Tensor  # [D, B, N, E], u's dtype
    d_delta: Tensor  # [D, B, N, E], delta's dtype
    d_k: Tensor  # [NE, D, B, N, M]
    d_q: Tensor  # [NE, D, B, N, M]
    d_A: Tensor  # [D, B, NS, M, E]
    d_skip: Tensor  # [D, B, NS, E]
    d_bias: Tensor  # [D, B, NS, E]


@triton.jit
def selective_scan_bwd_kernel(
    p_dy, p_u, p_delta, p_A, p_k, p_q, p_skip, p_bias, p_order, p_states,
    p_du, p_ddelta, p_dk, p_dq, p_dA, p_dskip, p_dbias, p_entering, p_total,
    B, N, E, NS, NT,
    dy_d, dy_b, dy_n, u_d, u_b, u_n, delta_d, delta_b, delta_n, k_d, k_b, k_n, q_d, q_b, q_n,
    M: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, L: tl.constexpr, FIRST: tl.constexpr,
    ORDER: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr,
    ENTERING: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One program per (direction, sample, segment, tile of channels), from the last step on.

    p_states [D, B, NS * NT, M, E] enters each tile. ENTERING: p_entering [D, B, NS, M, E] is the c
    of the step behind each segment, else 0. SEGMENTS: instead of gradients, to p_entering the c of
    a segment's first step with 0 behind its last, and to p_total [D, B, NS, E] the sum of its step
    sizes.
    """
    i_program = tl.program_id(0).to(tl.int64)
    NE = (E + BE - 1) // BE
    i_e = i_program % NE
    i_s = (i_program // NE) % NS
    i_b = (i_program // (NE * NS)) % B
    i_d = i_program // (NE * NS) // B
    i_sample = i_d * B + i_b
    i_segment = i_sample * NS + i_s
    samples = tl.num_programs(0) // (NE * NS)  # D B
    backward = (i_d + FIRST) == 1
    e = i_e * BE + tl.arange(0, BE)
    n = tl.arange(0, BM)
    m_e, m_n = e < E, n < M
    m_state = m_n[:, None] & m_e[None, :]
    o_state = n[:, None] * E + e[None, :]
    p_dy += i_d * dy_d + i_b * dy_b
    p_u += i_d * u_d + i_b * u_b
    p_delta += i_d * delta_d + i_b * delta_b
    p_k += i_d * k_d + i_b * k_b
    p_q += i_d * q_d + i_b * q_b
    p_entering += i_segment * M * E
    A = log2_rates(p_A + i_d * E * M, e, n, E, M)
    skip = vector(p_skip + i_d * E, e, m_e, SKIP)
    bias = vector(p_bias + i_d * E, e, m_e, BIAS)
    d_A = tl.zeros([BM, BE], tl.float32)
    d_skip = tl.zeros([BE], tl.float32)
    d_bias = tl.zeros([BE], tl.float32)
    total = tl.zeros([BE], tl.float32)
    p_dk += (i_e * samples + i_sample) * N * M
    p_dq += (i_e * samples + i_sample) * N * M
    c = tl.zeros([BM, BE], tl.float32)
    if ENTERING:
        c = tl.load(p_entering + o_state, mask=m_state, other=0.0)
    for i in range(0, NT):
        i_tile = i_s * NT + NT - 1 - i
        if SEGMENTS:
            for j in tl.static_range(L - 1, -1, -1):
                t, m = token_of(p_order, i_tile * L + j, N, backward, ORDER)
                step = softplus(row(p_delta + t * delta_n, e, m_e & m) + bias, DOT)
                q = row(p_q + t * q_n, n, m_n & m)
                g = row(p_dy + t * dy_n, e, m_e & m)[None, :] * q[:, None] + c
                c = tl.exp2(step[None, :] * A) * g
                total += step
        else:
            o_tile = (i_sample * NS * NT + i_tile) * M * E
            h = tl.load(p_states + o_tile + o_state, mask=m_state, other=0.0)
            kept = ()  # a_i h_{i-1} of each step: h_i less what it adds, without a subtraction
            for j in tl.static_range(L):
                t, m = token_of(p_order, i_tile * L + j, N, backward, ORDER)
                u = row(p_u + t * u_n, e, m_e & m)
                k = row(p_k + t * k_n, n, m_n & m)
                step = softplus(row(p_delta + t * delta_n, e, m_e & m) + bias, DOT)
                h = tl.exp2(step[None, :] * A) * h
                kept = kept + (h,)
                h += (step * u)[None, :] * k[:, None]
                d_q = tl.sum(h * row(p_dy + t * dy_n, e, m_e & m)[None, :], 1)
                tl.store(p_dq + t * M + n, d_q, mask=m_n & m)
            # Rows are read again: all of a tile at once would not fit in registers.
            for j in tl.static_range(L - 1, -1, -1):
                t, m = token_of(p_order, i_tile * L + j, N, backward, ORDER)
                u = row(p_u + t * u_n, e, m_e & m)
                d_y = row(p_dy + t * dy_n, e, m_e & m)
                k = row(p_k + t * k_n, n, m_n & m)
                q = row(p_q + t * q_n, n, m_n & m)
                raw = row(p_delta + t * delta_n, e, m_e & m) + bias
                step = softplus(raw, DOT)
                into = step * u
                g = d_y[None, :] * q[:, None] + c
                c = tl.exp2(step[None, :] * A) * g
                d_k = tl.sum(g * into[None, :], 1)
                tl.store(p_dk + t * M + n, d_k, mask=m_n & m)
                d_into = tl.sum(g * k[:, None], 0)
                d_exponent = g * kept[j]
                d_A += d_exponent * step[None, :]
                d_step = tl.sum(d_exponent * A, 0) * 0.6931471805599453 + u * d_into
                d_raw = d_step * decay_slope(-raw, 1.0)  # sigmoid(raw)
                d_u = step * d_into + skip * d_y
                d_skip += u * d_y
                d_bias += d_raw
                o_u = (i_sample * N + t) * E + e
                tl.store(p_du + o_u, d_u.to(p_du.dtype.element_ty), mask=m_e & m)
                tl.store(p_ddelta + o_u, d_raw.to(p_ddelta.dtype.element_ty), mask=m_e & m)
    if SEGMENTS:
        tl.store(p_entering + o_state, c, mask=m_state)
        tl.store(p_total + i_segment * E + e, total, mask=m_e)
    else:
        tl.store(p_dA + i_segment * M * E + o_state, d_A, mask=m_state)
        tl.store(p_dskip + i_segment * E + e, d_skip, mask=m_e)
        tl.store(p_dbias + i_segment * E + e, d_bias, mask=m_e)


def backward_launch(
    call: Call, d_y: Tensor, states: Tensor | None, gradients: Gradients | None,
    entering: Tensor | None, total: Tensor | None = None,
) -> Launch:  # fmt: skip
    """One launch: gradients, or without states and gradients what segments add."""
    B, N, E = call.u.shape[1:]
    spare = call.A  # where a pointer is not used
    strides = [s for x in (d_y, call.u, call.delta, call.k, call.q) for s in x.stride()[:3]]
    made = gradients or [None] * len(Gradients._fields)
    given = [call.skip, call.bias, call.order, states, *made, entering, total]
    arguments = (
        d_y, call.u, call.delta, call.A, call.k, call.q,
        *(spare if x is None else x for x in given), B, N, E, *call.segments, *strides,
    )  # fmt: skip
    constants = {
        **call.constants, "ENTERING": gradients is not None and entering is not None,
        "SEGMENTS": gradients is None,
    }  # fmt: skip
    return Launch(selective_scan_bwd_kernel, programs(call), arguments, constants, 1)


def backward_launches(call: Call, d_y: Tensor, edges: Any) -> tuple[Gradients, list[Any]]:
    """Gradients, not yet written, and what writes them. d_y [D, B, N, E], as call.u."""
    D, B, N, E = call.u.shape
    M, (NS, NT) = call.k.shape[3], call.segments
    NE = triton.cdiv(E, call.constants["BE"])
    of_states = torch.empty((2, NE, D, B, N, M), dtype=torch.float32, device=call.u.device)
    gradients = Gradients(
        torch.empty(call.u.shape, dtype=call.u.dtype, device=call.u.device),
        torch.empty(call.u.shape, dtype=call.delta.dtype, device=call.u.device),
        of_states[0], of_states[1],
        call.scratch(NS), call.scratch(NS, states=False), call.scratch(NS, states=False),
    )  # fmt: skip
    states = call.scratch(NS * NT)
    entering, launches = entering_launches(call, edges)
    launches.append(forward_launch(call, states, "states", entering))
    entering_c = None
    if NS > 1:
        added, entering_c = call.scratch(NS), call.scratch(NS)
        total = call.scratch(NS, states=False)
        launches += [
            backward_launch(call, d_y, None, None, added, total),
            edges(added, total, entering_c, call.A, True),
        ]
    launches.append(backward_launch(call, d_y, states, gradients, entering_c))
    return gradients, launches
