"""Gated linear attention on a GPU: the output. Letters and states: triton_states.py.

The mathematics, and why the pairs inside a chunk have two forms: kernels/README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch, decay_and_key, product, sums, tile, tokens
from metala_vision.kernels.gated_linear_attention.triton_states import (
    CHUNK,
    Call,
    entering_segments,
    num_slots,
    states_launch,
)

# A chunk takes the anchor where its log2 decay, summed to either side of it, is above this: the
# factors stay below 2^24, and rounding below 24 * 2^-24 of an exponent in float32.
ANCHOR_LIMIT: tl.constexpr = tl.constexpr(-24.0)


@triton.jit
def anchor_side(i, j, PLACE: tl.constexpr):
    """Table [L, L] of -1, 0, 1: how token j's log decay enters token i's exponent.

    The sum from the anchor, in front of token PLACE, to token i, its own included; negative left.
    """
    right = (i >= PLACE) & (j >= PLACE) & (j <= i)
    left = (i < PLACE) & (j < PLACE) & (j > i)
    return tl.where(right, 1.0, tl.where(left, -1.0, 0.0))


@triton.jit
def level_tables(level, i, j):
    """Of a level of the tree: which log decays enter a token's exponent, which pairs it owns."""
    s = 1 << level
    apart = i ^ j
    in_right = (i & s) != 0
    table = (apart < s) & ((in_right & (j < i)) | ((in_right == 0) & (j > i)))
    return table, (apart >= s) & (apart < 2 * s)


@triton.jit
def wanted(query, key, DIRECTION: tl.constexpr):
    """Which pairs of different tokens the direction asks for."""
    if DIRECTION == "forward":
        return key < query
    elif DIRECTION == "backward":
        return key > query
    else:
        return key != query


@triton.jit
def mild(log2_decay, r, PLACE: tl.constexpr):
    """Whether a chunk may take the anchor: a scalar. With a NaN either form gives NaN."""
    left = tl.sum(tl.where(r[:, None] < PLACE, log2_decay, 0.0), 0)
    right = tl.sum(tl.where(r[:, None] >= PLACE, log2_decay, 0.0), 0)
    return tl.min(tl.minimum(left, right), 0) > ANCHOR_LIMIT


@triton.jit
def pair_weights(q, qa, k, log2_decay, L: tl.constexpr, LEVELS: tl.constexpr, PLACE: tl.constexpr,
                 DIRECTION: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Weights [L, L] of the tokens j (columns) in the outputs of the tokens i of one chunk.

    qa is q * alpha: a query's own decay stands in each of its pairs.
    """
    r = tl.arange(0, L)
    i, j = r[:, None], r[None, :]
    weight = tl.zeros([L, L], tl.float32)
    if mild(log2_decay, r, PLACE):
        inclusive = sums(anchor_side(i, j, PLACE), log2_decay, DOT)
        up, down = tl.exp2(inclusive - log2_decay), tl.exp2(-inclusive)
        if DIRECTION != "backward":
            weight += tl.where(j < i, product(qa * up, tl.trans(k * down), DOT), 0.0)
        if DIRECTION != "forward":
            weight += tl.where(j > i, product(qa * down, tl.trans(k * up), DOT), 0.0)
    else:
        for level in range(LEVELS):
            table, pairs = level_tables(level, i, j)
            factor = tl.exp2(sums(table, log2_decay, DOT))
            pairs = pairs & wanted(i, j, DIRECTION)
            weight += tl.where(pairs, product(qa * factor, tl.trans(k * factor), DOT), 0.0)
    own = tl.sum(q * k, 1)
    if DIRECTION == "bidirectional":
        own = 2.0 * own
    return tl.where(i == j, own[:, None], weight)


@triton.jit
def gated_linear_attention_fwd_kernel(
    p_q, p_k, p_decay, p_v, p_order, p_o, p_right, p_entering, p_leaving,
    N, H, NS, NC, rate, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, decay_b, decay_n, decay_h, v_b, v_n, v_h, order_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NK: tl.constexpr, NV: tl.constexpr,
    L: tl.constexpr, LEVELS: tl.constexpr, PLACE: tl.constexpr,
    ENTERING: tl.constexpr, LEAVING: tl.constexpr, DIRECTION: tl.constexpr, DECAY: tl.constexpr,
    KEY: tl.constexpr, ORDER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o [B, N, H, V], contiguous, in one launch: one program per (batch, head, segment, tile of V).

    For one tile of K, as the state stays in registers. From right to left, the states that enter
    each chunk from the right go to p_right [programs, NC, BK, BV]; then from left to right, each
    chunk's output is written once. p_entering [B * H, NS, directions, state]: what enters a
    segment, if ENTERING. p_leaving [B * H, state]: what leaves the last one, if LEAVING.
    """
    SLOTS: tl.constexpr = 2 if DIRECTION == "bidirectional" else 1
    KV: tl.constexpr = BK * NV * BV
    i_program = tl.program_id(0).to(tl.int64)
    i_v = i_program % NV
    i_s = (i_program // NV) % NS
    i_bh = i_program // NV // NS
    i_b, i_h = i_bh // H, i_bh % H
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    c_k, c_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    start = i_s * NC * L
    num_chunks = tl.minimum(NC, tl.cdiv(N - start, L))
    p_q += i_b * q_b + i_h * q_h
    p_k += i_b * k_b + i_h * k_h
    p_decay += i_b * decay_b + i_h * decay_h
    p_v += i_b * v_b + i_h * v_h
    p_o += (i_b * N * H + i_h) * V
    p_leaving += i_bh * KV + c_k[:, None] * (NV * BV) + c_v[None, :]
    p_right += i_program * NC * BK * BV + c_k[:, None] * BV + tl.arange(0, BV)[None, :]
    p_entering += (i_bh * NS + i_s) * SLOTS * KV + c_k[:, None] * (NV * BV) + c_v[None, :]
    left = tl.zeros([BK, BV], tl.float32)
    right = tl.zeros([BK, BV], tl.float32)
    if ENTERING:
        if DIRECTION != "backward":
            left = tl.load(p_entering)
        if DIRECTION != "forward":
            right = tl.load(p_entering + (SLOTS - 1) * KV)
    if DIRECTION != "forward":
        for n in range(0, num_chunks):
            c = (num_chunks - 1 - n).to(tl.int64)
            tl.store(p_right + c * BK * BV, right.to(p_right.dtype.element_ty))
            t, m = tokens(p_order, order_h, i_h, start + c * L, N, L, ORDER)
            v = tile(p_v, v_n, t, c_v, m, V, 0.0)
            log2_decay, _, k = decay_and_key(
                p_decay, decay_n, p_k, k_n, t, c_k, m, rate, K, DECAY, KEY, DOT
            )
            before = tl.exp2(sums(j < i, log2_decay, DOT))
            right = right * tl.exp2(tl.sum(log2_decay, 0))[:, None]
            right += product(tl.trans(k * before), v, DOT)
        if LEAVING and DIRECTION == "backward":
            if i_s == 0:
                tl.store(p_leaving, right)
        # What a thread reads below, others have written. On AMD the barrier alone does not wait for
        # stores, but the loop's loads are waited for after them, and that does.
        tl.debug_barrier()
    for n in range(0, num_chunks):
        c = tl.cast(n, tl.int64)
        t, m = tokens(p_order, order_h, i_h, start + c * L, N, L, ORDER)
        q = tile(p_q, q_n, t, c_k, m, K, 0.0).to(tl.float32) * scale
        v = tile(p_v, v_n, t, c_v, m, V, 0.0)
        log2_decay, alpha, k = decay_and_key(
            p_decay, decay_n, p_k, k_n, t, c_k, m, rate, K, DECAY, KEY, DOT
        )
        qa = q * alpha
        weight = pair_weights(q, qa, k, log2_decay, L, LEVELS, PLACE, DIRECTION, DOT)
        o = product(weight, v, DOT)
        after = tl.exp2(sums(j > i, log2_decay, DOT))
        if DIRECTION != "forward":
            o += product(qa * after, tl.load(p_right + c * BK * BV), DOT)
        if DIRECTION != "backward":
            before = tl.exp2(sums(j < i, log2_decay, DOT))
            o += product(qa * before, left, DOT)
            left = left * tl.exp2(tl.sum(log2_decay, 0))[:, None]
            left += product(tl.trans(k * after), v, DOT)
        tl.store(p_o + t[:, None] * (H * V) + c_v[None, :], o.to(p_o.dtype.element_ty),
                 mask=m[:, None] & (c_v < V)[None, :])  # fmt: skip
    if LEAVING and DIRECTION == "forward":
        if i_s == NS - 1:
            tl.store(p_leaving, left)


@triton.jit
def gated_linear_attention_fwd_kernel_wide(
    p_q, p_k, p_decay, p_v, p_order, p_o, p_states,
    N, H, rate, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, decay_b, decay_n, decay_h, v_b, v_n, v_h, order_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NK: tl.constexpr, NV: tl.constexpr,
    L: tl.constexpr, LEVELS: tl.constexpr, PLACE: tl.constexpr, DIRECTION: tl.constexpr,
    DECAY: tl.constexpr, KEY: tl.constexpr, ORDER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o [B, N, H, V], contiguous, for any width of keys: one program per (chunk, tile of V).

    p_states [B * H, chunks, directions, state]: what enters each chunk.
    """
    SLOTS: tl.constexpr = 2 if DIRECTION == "bidirectional" else 1
    KV: tl.constexpr = NK * BK * NV * BV
    i_program = tl.program_id(0).to(tl.int64)
    NC = tl.cdiv(N, L)
    i_v = i_program % NV
    i_c = (i_program // NV) % NC
    i_bh = i_program // NV // NC
    i_b, i_h = i_bh // H, i_bh % H
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    c_v = i_v * BV + tl.arange(0, BV)
    t, m = tokens(p_order, order_h, i_h, i_c * L, N, L, ORDER)
    p_q += i_b * q_b + i_h * q_h
    p_k += i_b * k_b + i_h * k_h
    p_decay += i_b * decay_b + i_h * decay_h
    p_v += i_b * v_b + i_h * v_h
    p_states += (i_bh * NC + i_c) * SLOTS * KV
    weight = tl.zeros([L, L], tl.float32)
    o = tl.zeros([L, BV], tl.float32)
    for i_k in range(0, NK):
        c_k = i_k * BK + tl.arange(0, BK)
        o_state = c_k[:, None] * (NV * BV) + c_v[None, :]
        q = tile(p_q, q_n, t, c_k, m, K, 0.0).to(tl.float32) * scale
        log2_decay, alpha, k = decay_and_key(
            p_decay, decay_n, p_k, k_n, t, c_k, m, rate, K, DECAY, KEY, DOT
        )
        qa = q * alpha
        weight += pair_weights(q, qa, k, log2_decay, L, LEVELS, PLACE, DIRECTION, DOT)
        if DIRECTION != "backward":
            before = tl.exp2(sums(j < i, log2_decay, DOT))
            o += product(qa * before, tl.load(p_states + o_state), DOT)
        if DIRECTION != "forward":
            after = tl.exp2(sums(j > i, log2_decay, DOT))
            o += product(qa * after, tl.load(p_states + (SLOTS - 1) * KV + o_state), DOT)
    o += product(weight, tile(p_v, v_n, t, c_v, m, V, 0.0), DOT)
    p_o += (i_b * N * H + i_h) * V
    tl.store(p_o + t[:, None] * (H * V) + c_v[None, :], o.to(p_o.dtype.element_ty),
             mask=m[:, None] & (c_v < V)[None, :])  # fmt: skip


def forward_launches(
    call: Call, dtype: torch.dtype, initial: Tensor | None = None, leaving: Tensor | None = None
) -> tuple[Tensor, list[Launch]]:
    """The output o [B, N, H, V] in dtype, not yet written, and the launches that write it.

    One direction: initial [B * H, 1, state] enters, and what leaves goes to `leaving`, the same.
    """
    q, c, direction = call.q, call.configuration, call.direction
    B, N, H, _ = q.shape
    o = torch.empty(call.v.shape, dtype=dtype, device=q.device)
    entering, launches = entering_segments(call, None, initial)
    constants = {
        **c.tiles, **call.modes, "L": CHUNK, "LEVELS": CHUNK.bit_length() - 1,
        "PLACE": anchor_place(direction),
    }  # fmt: skip
    numbers = (1 / call.gate_divisor, call.scale, *call.strides)
    if c.tiles["NK"] == 1:
        programs = B * H * c.num_segments * c.tiles["NV"]
        right = o  # a placeholder where the kernel does not touch it
        if direction != "forward":
            right = q.new_empty(
                (programs, c.chunks_per_segment, c.tiles["BK"], c.tiles["BV"]), dtype=c.state_dtype
            )
        buffers = (right, o if entering is None else entering, o if leaving is None else leaving)
        arguments = (
            *call.tensors, o, *buffers, N, H, c.num_segments, c.chunks_per_segment, *numbers
        )  # fmt: skip
        constants |= {"ENTERING": entering is not None, "LEAVING": leaving is not None}
        kernel = gated_linear_attention_fwd_kernel
    else:
        slots = num_slots(direction, False)
        states = q.new_empty((B * H, c.num_chunks, slots, *c.state), dtype=c.state_dtype)
        launches.append(
            states_launch(call, None, states=states, entering=entering, leaving=leaving)
        )
        programs = B * H * c.num_chunks * c.tiles["NV"]
        arguments = (*call.tensors, o, states, N, H, *numbers)
        kernel = gated_linear_attention_fwd_kernel_wide
    launches.append(Launch(kernel, programs, arguments, constants, c.fwd_warps))
    return o, launches


def anchor_place(direction: str) -> int:
    """Where the pairs of a chunk meet: one direction alone, where it enters, so that a token's
    factors hold nothing of what comes after it. (The choice of the form still does: rounding.)"""
    return {"forward": 0, "backward": CHUNK, "bidirectional": CHUNK // 2}[direction]
