"""Gated linear attention on a GPU: how a call is cut, and the states that enter its parts.

B batch, N tokens, H heads, K key width per head, V value width per head; BK and BV their tiles,
powers of two, NK and NV of them. A chunk has L tokens, a segment NC chunks, a sequence NS segments.

State [K, V], padded to NK * BK and NV * BV. A program runs along a segment from its left or from
its right, and carries
    keys       the sum of decayed k v^T, which queries of one direction read; from the left,
               forward's, from the right, backward's
    queries    in the backward pass also that of decayed q d_o^T, which the gradients of keys and
               values read; from the left, backward's, from the right, forward's
A slot holds one state: keys from the left, keys from the right, then queries likewise. One
direction alone has one slot for keys and one for queries.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import Launch, decay_and_key, product, sums, tile, tokens

# A tile of a product has 16 rows at least. More pairs in a chunk cost registers: with 32, spills.
CHUNK = 16
LONGEST_SEGMENT = 256  # tokens: so many are one program's, and more are cut


@dataclass(frozen=True)
class Configuration:
    """How a call is cut into tiles, programs and warps."""

    tiles: dict[str, int]  # K, V, BK, BV, NK, NV
    state: tuple[int, int]  # padded
    num_chunks: int
    chunks_per_segment: int
    num_segments: int
    state_dtype: torch.dtype  # of the states of chunks
    fwd_warps: int
    states_warps: int
    bwd_warps: int


def configure(N: int, K: int, V: int, dot: str) -> Configuration:
    """By widths and type alone: few configurations, all compiled by the tests for every target.

    No tile has 64 rows, so that no product becomes one of Hopper's warp group instructions, which
    Triton 3.4 to 3.7.0 gets wrong: kernels/README.md.
    """
    BK = 16 if K <= 16 or (K > 32 and dot == "ieee") else 32
    widest = {"ieee": 16, "tf32": 32 if K <= 32 else 16}.get(dot, 64)
    BV = min(max(16, triton.next_power_of_2(V)), widest)
    NK, NV = triton.cdiv(K, BK), triton.cdiv(V, BV)
    num_chunks = triton.cdiv(N, CHUNK)
    num_segments = triton.cdiv(num_chunks, LONGEST_SEGMENT // CHUNK)
    return Configuration(
        tiles={"K": K, "V": V, "BK": BK, "BV": BV, "NK": NK, "NV": NV},
        state=(NK * BK, NV * BV),
        num_chunks=num_chunks,
        chunks_per_segment=triton.cdiv(num_chunks, num_segments),
        num_segments=num_segments,
        state_dtype=torch.bfloat16 if dot == "bf16" else torch.float32,
        fwd_warps={"ieee": 8 if NK == 1 else 4, "tf32": 4}.get(dot, 2),
        states_warps=2,
        bwd_warps={"ieee": 8, "tf32": 8 if NK == 1 else 4}.get(dot, 4),
    )


@triton.jit
def gated_linear_attention_states_kernel(
    p_q, p_k, p_decay, p_v, p_order, p_do, p_states, p_entering, p_total, p_leaving,
    N, H, NS, NC, rate, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, decay_b, decay_n, decay_h, v_b, v_n, v_h, order_h,
    do_b, do_n, do_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NK: tl.constexpr, NV: tl.constexpr,
    L: tl.constexpr, DIRECTION: tl.constexpr, QUERIES: tl.constexpr, SIDES: tl.constexpr,
    SLOTS: tl.constexpr, EACH: tl.constexpr, ENTERING: tl.constexpr, LEAVING: tl.constexpr,
    DECAY: tl.constexpr, KEY: tl.constexpr, ORDER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head, segment, side, tile of K, tile of V).

    EACH: to p_states [B * H, chunks, SLOTS, state], what enters each chunk. Otherwise to
    p_entering [B * H, NS, SLOTS, state], what the segment adds to a state of 0, and to
    p_total [B * H, NS, NK * BK], its log2 decay. EACH and ENTERING: p_entering holds what enters
    the segments. EACH and LEAVING: to p_leaving [B * H, SLOTS, state], what leaves the last one.
    QUERIES: both states (in the backward pass), else keys alone.
    """
    KV: tl.constexpr = NK * BK * NV * BV
    i_program = tl.program_id(0).to(tl.int64)
    i_v = i_program % NV
    i_k = (i_program // NV) % NK
    side = (i_program // (NV * NK)) % SIDES
    i_s = (i_program // (NV * NK * SIDES)) % NS
    i_bh = i_program // (NV * NK * SIDES) // NS
    i_b, i_h = i_bh // H, i_bh % H
    if DIRECTION == "bidirectional":
        from_right = side == 1
        slot_keys, slot_queries = side, side + 2
    elif QUERIES:  # keys from the side where the direction starts, queries from the other
        from_right = side == (0 if DIRECTION == "backward" else 1)
        slot_keys, slot_queries = side, side
    else:
        from_right = DIRECTION == "backward"
        slot_keys, slot_queries = side, side
    # One direction alone carries keys on side 0 and queries on side 1.
    with_keys = (DIRECTION == "bidirectional") or (side == 0)
    with_queries = QUERIES and ((DIRECTION == "bidirectional") or (side == 1))
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    c_k, c_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    start = i_s * NC * L
    num_chunks = tl.minimum(NC, tl.cdiv(N - start, L))
    p_q += i_b * q_b + i_h * q_h
    p_k += i_b * k_b + i_h * k_h
    p_decay += i_b * decay_b + i_h * decay_h
    p_v += i_b * v_b + i_h * v_h
    p_do += i_b * do_b + i_h * do_h
    o_state = c_k[:, None] * (NV * BV) + c_v[None, :]
    p_states += (i_bh * tl.cdiv(N, L) + i_s * NC) * SLOTS * KV
    p_entering += (i_bh * NS + i_s) * SLOTS * KV
    keys = tl.zeros([BK, BV], tl.float32)
    queries = tl.zeros([BK, BV], tl.float32)
    total = tl.zeros([BK], tl.float32)
    if EACH and ENTERING:
        if with_keys:
            keys = tl.load(p_entering + slot_keys * KV + o_state)
        if with_queries:
            queries = tl.load(p_entering + slot_queries * KV + o_state)
    for n in range(0, num_chunks):
        c = tl.where(from_right, num_chunks - 1 - n, n).to(tl.int64)
        t, m = tokens(p_order, order_h, i_h, start + c * L, N, L, ORDER)
        log2_decay, alpha, k = decay_and_key(
            p_decay, decay_n, p_k, k_n, t, c_k, m, rate, K, DECAY, KEY, DOT
        )
        # Towards the end that the state leaves by: the right one if it comes from the left.
        factor = tl.exp2(sums(tl.where(from_right, j < i, j > i), log2_decay, DOT))
        decay = tl.sum(log2_decay, 0)
        if with_keys:
            if EACH:
                p_state = p_states + (c * SLOTS + slot_keys) * KV
                tl.store(p_state + o_state, keys.to(p_states.dtype.element_ty))
            v = tile(p_v, v_n, t, c_v, m, V, 0.0)
            keys = keys * tl.exp2(decay)[:, None] + product(tl.trans(k * factor), v, DOT)
        if with_queries:
            if EACH:
                p_state = p_states + (c * SLOTS + slot_queries) * KV
                tl.store(p_state + o_state, queries.to(p_states.dtype.element_ty))
            q = tile(p_q, q_n, t, c_k, m, K, 0.0).to(tl.float32) * scale
            d_o = tile(p_do, do_n, t, c_v, m, V, 0.0)
            queries = queries * tl.exp2(decay)[:, None]
            queries += product(tl.trans(q * alpha * factor), d_o, DOT)
        total += decay
    if not EACH:
        if with_keys:
            tl.store(p_entering + slot_keys * KV + o_state, keys)
        if with_queries:
            tl.store(p_entering + slot_queries * KV + o_state, queries)
        if side == 0 and i_v == 0:
            tl.store(p_total + (i_bh * NS + i_s) * (NK * BK) + c_k, total)
    if EACH and LEAVING:
        p_leaving += i_bh * SLOTS * KV + o_state
        if i_s == tl.where(from_right, 0, NS - 1):
            if with_keys:
                tl.store(p_leaving + slot_keys * KV, keys)
            if with_queries:
                tl.store(p_leaving + slot_queries * KV, queries)


@triton.jit
def gated_linear_attention_scan_kernel(
    p_added, p_entering, p_total, p_initial, NS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NK: tl.constexpr, NV: tl.constexpr,
    SLOTS: tl.constexpr, FLIP: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """From what segments add to a state of 0, what enters them: the same shape.

    One program per (batch, head, slot, tile of K, tile of V). Slots come from the left and from
    the right in turn; FLIP 1 if the right is first. INITIAL: p_initial [B * H, SLOTS, state]
    enters the first segment, else 0 does.
    """
    KV: tl.constexpr = NK * BK * NV * BV
    i_program = tl.program_id(0).to(tl.int64)
    i_v = i_program % NV
    i_k = (i_program // NV) % NK
    slot = (i_program // (NV * NK)) % SLOTS
    i_bh = i_program // (NV * NK * SLOTS)
    from_right = (slot + FLIP) % 2 == 1
    c_k, c_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_state = (i_bh * NS * SLOTS + slot) * KV + c_k[:, None] * (NV * BV) + c_v[None, :]
    p_added += o_state
    p_entering += o_state
    p_total += i_bh * NS * (NK * BK)
    state = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        o_initial = (i_bh * SLOTS + slot) * KV + c_k[:, None] * (NV * BV) + c_v[None, :]
        state = tl.load(p_initial + o_initial)
    for n in range(0, NS):
        s = tl.where(from_right, NS - 1 - n, n).to(tl.int64)
        tl.store(p_entering + s * SLOTS * KV, state)
        state = state * tl.exp2(tl.load(p_total + s * (NK * BK) + c_k))[:, None]
        state += tl.load(p_added + s * SLOTS * KV)


@dataclass(frozen=True)
class Call:
    """One call of the operator with one decay, and how it is cut."""

    q: Tensor  # [B, N, H, K]
    v: Tensor  # [B, N, H, V]
    k: Tensor | None  # [B, N, H, K]
    decay: Tensor | None  # [B, N, H, K], as decay_mode says
    decay_mode: str  # "gate", "log" or "none"
    order: Tensor | None  # [N] or [H, N]
    gate_divisor: float
    scale: float
    direction: str
    dot: str

    @cached_property
    def configuration(self) -> Configuration:
        return configure(self.q.shape[1], self.q.shape[3], self.v.shape[3], self.dot)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, decay, v and order; in place of one that is not there, one that is."""
        others = (self.q if x is None else x for x in (self.k, self.decay))
        return self.q, *others, self.v, self.v if self.order is None else self.order

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of q, k, decay and v over batch, token and head, and of order over heads."""
        strides = tuple(stride for x in self.tensors[:4] for stride in x.stride()[:3])
        per_head = self.order is not None and self.order.dim() == 2
        return *strides, self.tensors[4].stride(0) if per_head else 0

    @cached_property
    def modes(self) -> dict[str, Any]:
        return {
            "DECAY": self.decay_mode, "KEY": self.k is not None, "ORDER": self.order is not None,
            "DIRECTION": self.direction, "DOT": self.dot,
        }  # fmt: skip


def num_slots(direction: str, queries: bool) -> int:
    return (2 if direction == "bidirectional" else 1) * (2 if queries else 1)


def padded(states: list[Tensor | None], call: Call) -> Tensor:
    """States [B, H, K, V] as [B * H, how many, state], 0 for one that is None."""
    B, _, H, K = call.q.shape
    rows, columns = call.configuration.state
    whole = call.q.new_zeros((B, H, len(states), rows, columns), dtype=torch.float32)
    for i, state in enumerate(states):
        if state is not None:
            whole[:, :, i, :K, : call.v.shape[3]] = state
    return whole.flatten(0, 1)


def states_launch(
    call: Call,
    d_o: Tensor | None,
    *,
    states: Tensor | None = None,
    entering: Tensor | None = None,
    total: Tensor | None = None,
    leaving: Tensor | None = None,
) -> Launch:
    """Of gated_linear_attention_states_kernel, with queries if there is a d_o.

    With `states`, those of each chunk; without, what segments add, into `entering` and `total`.
    """
    c, queries, direction = call.configuration, d_o is not None, call.direction
    B, N, H, _ = call.q.shape
    sides = 2 if direction == "bidirectional" or queries else 1
    d_o = call.v if d_o is None else d_o
    buffers = (call.v if x is None else x for x in (states, entering, total, leaving))
    return Launch(
        gated_linear_attention_states_kernel,
        B * H * c.num_segments * sides * c.tiles["NK"] * c.tiles["NV"],
        (
            *call.tensors, d_o, *buffers,
            N, H, c.num_segments, c.chunks_per_segment, 1 / call.gate_divisor, call.scale,
            *call.strides, *d_o.stride()[:3],
        ),
        {
            **c.tiles, **call.modes, "L": CHUNK, "QUERIES": queries, "SIDES": sides,
            "SLOTS": num_slots(direction, queries), "EACH": states is not None,
            "ENTERING": entering is not None, "LEAVING": leaving is not None,
        },
        c.states_warps,
    )  # fmt: skip


def entering_segments(
    call: Call, d_o: Tensor | None, initial: Tensor | None
) -> tuple[Tensor | None, list[Launch]]:
    """The states that enter each segment, not yet written, and the two launches that do.

    initial [B * H, slots, state]: what enters the first. None if nothing enters a single segment.
    """
    c = call.configuration
    if c.num_segments == 1:
        return (None if initial is None else initial.unsqueeze(1)), []
    B, _, H, _ = call.q.shape
    slots = num_slots(call.direction, d_o is not None)
    added = call.q.new_empty((B * H, c.num_segments, slots, *c.state), dtype=torch.float32)
    entering = torch.empty_like(added)
    total = call.q.new_empty((B * H, c.num_segments, c.state[0]), dtype=torch.float32)
    add = states_launch(call, d_o, entering=added, total=total)
    scan = Launch(
        gated_linear_attention_scan_kernel,
        B * H * slots * c.tiles["NK"] * c.tiles["NV"],
        (added, entering, total, added if initial is None else initial, c.num_segments),
        {
            **c.tiles, "SLOTS": slots, "FLIP": int(call.direction == "backward"),
            "INITIAL": initial is not None,
        },
        c.states_warps,
    )  # fmt: skip
    return entering, [add, scan]
