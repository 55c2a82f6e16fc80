"""Gated linear attention on a GPU: the gradients. Letters and states: triton_states.py.

With the states that enter its chunk, a program needs no other token. The gradient of log alpha_t is
a sum over the pairs with t between them, a query's own decay included; nowhere is it made as a
difference of rounded sums: kernels/README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metala_vision.kernels._triton import (
    Launch,
    decay_and_key,
    decay_slope,
    operand,
    product,
    sums,
    tile,
    tokens,
)
from metala_vision.kernels.gated_linear_attention.triton_fwd import (
    anchor_place,
    anchor_side,
    level_tables,
    mild,
    wanted,
)
from metala_vision.kernels.gated_linear_attention.triton_states import (
    CHUNK,
    Call,
    entering_segments,
    num_slots,
    states_launch,
)

# The anchor subtracts, exactly but for float32's rounding, in which a steep token among mild ones
# drowns: of one token's log2 decay, the least where the gradient takes the anchor.
STEP_LIMIT: tl.constexpr = tl.constexpr(-3.0)


@triton.jit
def gradients_by_level(qa, k, log2_decay, d_weight, d_weight_t, r, LEVELS: tl.constexpr,
                       DIRECTION: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Of the pairs inside a leaf: weights transposed, gradients of qa, k and log alpha.

    Of log alpha without a query's own. A level's table says which log decays its exponents sum, so
    the table transposed says where their gradients go: sums again, of that level's pairs alone.
    """
    i, j = r[:, None], r[None, :]
    weight_t = tl.zeros_like(d_weight)
    d_qa = tl.zeros_like(qa)
    d_k = tl.zeros_like(qa)
    d_log = tl.zeros_like(qa)
    for level in range(LEVELS):
        table, pairs = level_tables(level, i, j)
        table_t, _ = level_tables(level, j, i)
        factor = tl.exp2(sums(table, log2_decay, DOT))
        q_level, k_level = qa * factor, k * factor
        here, here_t = pairs & wanted(i, j, DIRECTION), pairs & wanted(j, i, DIRECTION)
        weight_t += tl.where(here_t, product(k_level, tl.trans(q_level), DOT), 0.0)
        d_q_level = factor * product(tl.where(here, d_weight, 0.0), k_level, DOT)
        d_k_level = factor * product(tl.where(here_t, d_weight_t, 0.0), q_level, DOT)
        d_log += product(table_t, qa * d_q_level + k * d_k_level, DOT)
        d_qa += d_q_level
        d_k += d_k_level
    return weight_t, d_qa, d_k, d_log


@triton.jit
def gradients_by_anchor(qa, k, log2_decay, d_weight, d_weight_t, r, PLACE: tl.constexpr,
                        DIRECTION: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """As gradients_by_level, for a mild leaf.

    The gradient of log alpha subtracts what pairs on one side of a token give to their queries and
    to their keys. Both are sums of the same products of the same rounded operands, so that the
    difference is rounded as float32 is, whatever DOT.
    """
    i, j = r[:, None], r[None, :]
    inclusive = sums(anchor_side(i, j, PLACE), log2_decay, DOT)
    up, down = tl.exp2(inclusive - log2_decay), tl.exp2(-inclusive)
    weight_t = tl.zeros_like(d_weight)
    d_qa = tl.zeros_like(qa)
    d_k = tl.zeros_like(qa)
    d_log = tl.zeros_like(qa)
    if DIRECTION != "backward":
        query, key = operand(qa * up, DOT), operand(k * down, DOT)
        weight_t += tl.where(j > i, product(key, tl.trans(query), DOT), 0.0)
        d_query = product(tl.where(j < i, d_weight, 0.0), key, DOT)
        d_key = product(tl.where(j > i, d_weight_t, 0.0), query, DOT)
        of_query, of_key = query.to(tl.float32) * d_query, key.to(tl.float32) * d_key
        d_log += tl.cumsum(of_query - of_key, 0, reverse=True) - of_query
        d_qa += up * d_query
        d_k += down * d_key
    if DIRECTION != "forward":
        query, key = operand(qa * down, DOT), operand(k * up, DOT)
        weight_t += tl.where(j < i, product(key, tl.trans(query), DOT), 0.0)
        d_query = product(tl.where(j > i, d_weight, 0.0), key, DOT)
        d_key = product(tl.where(j < i, d_weight_t, 0.0), query, DOT)
        of_query, of_key = query.to(tl.float32) * d_query, key.to(tl.float32) * d_key
        d_log += tl.cumsum(of_key - of_query, 0, reverse=True) - of_key
        d_qa += down * d_query
        d_k += up * d_key
    return weight_t, d_qa, d_k, d_log


@triton.jit
def key_factors(log2_decay, k, DOT: tl.constexpr):
    """k with the decay of the tokens before it, and of those after it."""
    r = tl.arange(0, log2_decay.shape[0])
    i, j = r[:, None], r[None, :]
    before = tl.exp2(sums(j < i, log2_decay, DOT))
    after = tl.exp2(sums(j > i, log2_decay, DOT))
    return k * before, k * after, before, after


@triton.jit
def gradients_of_channels(
    p_q, p_k, p_decay, p_v, p_do, p_states, p_dq, p_dk, p_ddecay, d_weight, d_weight_t, d_own,
    t, m, i_k, H, rate, scale, q_n, k_n, decay_n, v_n, do_n,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    LEVELS: tl.constexpr, PLACE: tl.constexpr, KV: tl.constexpr, DIRECTION: tl.constexpr,
    DECAY: tl.constexpr, KEY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """d_q, d_k and d_decay of a chunk in one tile of K, stored.

    Returns its part of the weights transposed, and its keys with the decay before and after them.
    """
    # Slots; one that the direction does not have is not read.
    KEYS_LEFT: tl.constexpr = 0
    KEYS_RIGHT: tl.constexpr = 1 if DIRECTION == "bidirectional" else 0
    QUERIES_LEFT: tl.constexpr = 2 if DIRECTION == "bidirectional" else 1
    QUERIES_RIGHT: tl.constexpr = 3 if DIRECTION == "bidirectional" else 1
    OWN: tl.constexpr = 2.0 if DIRECTION == "bidirectional" else 1.0
    L: tl.constexpr = d_own.shape[0]
    r = tl.arange(0, L)
    i, j = r[:, None], r[None, :]
    c_k = i_k * BK + tl.arange(0, BK)
    # 1. What needs the states: pairs with one token outside of the chunk, or both.
    d_q_left = tl.zeros([L, BK], tl.float32)
    d_k_left = tl.zeros([L, BK], tl.float32)
    d_q_right = tl.zeros([L, BK], tl.float32)
    d_k_right = tl.zeros([L, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    for i_v in range(0, NV):
        c_v = i_v * BV + tl.arange(0, BV)
        o_state = c_k[:, None] * (NV * BV) + c_v[None, :]
        v = tile(p_v, v_n, t, c_v, m, V, 0.0)
        d_o = tile(p_do, do_n, t, c_v, m, V, 0.0)
        if DIRECTION != "backward":
            keys = tl.load(p_states + KEYS_LEFT * KV + o_state)
            queries = tl.load(p_states + QUERIES_RIGHT * KV + o_state)
            d_q_left += product(d_o, tl.trans(keys), DOT)
            d_k_right += product(v, tl.trans(queries), DOT)
            through += tl.sum(keys.to(tl.float32) * queries.to(tl.float32), 1)
        if DIRECTION != "forward":
            keys = tl.load(p_states + KEYS_RIGHT * KV + o_state)
            queries = tl.load(p_states + QUERIES_LEFT * KV + o_state)
            d_q_right += product(d_o, tl.trans(keys), DOT)
            d_k_left += product(v, tl.trans(queries), DOT)
            through += tl.sum(keys.to(tl.float32) * queries.to(tl.float32), 1)
    q = tile(p_q, q_n, t, c_k, m, K, 0.0).to(tl.float32) * scale
    log2_decay, alpha, k = decay_and_key(
        p_decay, decay_n, p_k, k_n, t, c_k, m, rate, K, DECAY, KEY, DOT
    )
    qa = q * alpha
    k_before, k_after, before, after = key_factors(log2_decay, k, DOT)
    d_q_left *= before
    d_k_left *= before
    d_q_right *= after
    d_k_right *= after
    d_log = product(j > i, qa * d_q_left + k * d_k_left, DOT)
    d_log += product(j < i, qa * d_q_right + k * d_k_right, DOT)
    d_log += (tl.exp2(tl.sum(log2_decay, 0)) * through)[None, :]
    # 2. Pairs inside the chunk.
    steepest = tl.min(tl.min(log2_decay, 1), 0)
    if mild(log2_decay, r, PLACE) & (steepest > STEP_LIMIT):
        weight_t, d_qa, d_k, d_inside = gradients_by_anchor(
            qa, k, log2_decay, d_weight, d_weight_t, r, PLACE, DIRECTION, DOT
        )
    else:
        weight_t, d_qa, d_k, d_inside = gradients_by_level(
            qa, k, log2_decay, d_weight, d_weight_t, r, LEVELS, DIRECTION, DOT
        )
    weight_t = tl.where(i == j, OWN * tl.sum(q * k, 1)[:, None], weight_t)
    d_log += d_inside
    d_qa += d_q_left + d_q_right
    d_k += d_k_left + d_k_right
    # 3. A query's own decay and a token's own weight, then the gradients.
    d_log += qa * d_qa
    d_k += d_own[:, None] * q
    d_q = (d_qa * alpha + d_own[:, None] * k) * scale
    m_k = m[:, None] & (c_k < K)[None, :]
    o_k = t[:, None] * (H * K) + c_k[None, :]
    tl.store(p_dq + o_k, d_q.to(p_dq.dtype.element_ty), mask=m_k)
    if KEY:
        tl.store(p_dk + o_k, d_k.to(p_dk.dtype.element_ty), mask=m_k)
    else:
        d_log -= alpha * d_k
    if DECAY == "gate":
        d_log *= decay_slope(tile(p_decay, decay_n, t, c_k, m, K, float("inf")), rate)
    if DECAY != "none":
        tl.store(p_ddecay + o_k, d_log.to(p_ddecay.dtype.element_ty), mask=m_k)
    return weight_t, k_before, k_after


@triton.jit
def gated_linear_attention_bwd_kernel(
    p_q, p_k, p_decay, p_v, p_order, p_do, p_states, p_dq, p_dk, p_ddecay, p_dv,
    N, H, rate, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, decay_b, decay_n, decay_h, v_b, v_n, v_h, order_h,
    do_b, do_n, do_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NK: tl.constexpr, NV: tl.constexpr,
    L: tl.constexpr, LEVELS: tl.constexpr, PLACE: tl.constexpr, DIRECTION: tl.constexpr,
    DECAY: tl.constexpr, KEY: tl.constexpr, ORDER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """d_q, d_k (if KEY), d_decay (if there is one) [B, N, H, K] and d_v [B, N, H, V], contiguous:
    one program per chunk.

    p_states [B * H, chunks, slots, state]: the states that enter each chunk.
    """
    SLOTS: tl.constexpr = 4 if DIRECTION == "bidirectional" else 2
    QUERIES_LEFT: tl.constexpr = 2 if DIRECTION == "bidirectional" else 1
    QUERIES_RIGHT: tl.constexpr = 3 if DIRECTION == "bidirectional" else 1
    OWN: tl.constexpr = 2.0 if DIRECTION == "bidirectional" else 1.0
    KV: tl.constexpr = NK * BK * NV * BV
    i_program = tl.program_id(0).to(tl.int64)
    NC = tl.cdiv(N, L)
    i_c = i_program % NC
    i_bh = i_program // NC
    i_b, i_h = i_bh // H, i_bh % H
    p_q += i_b * q_b + i_h * q_h
    p_k += i_b * k_b + i_h * k_h
    p_decay += i_b * decay_b + i_h * decay_h
    p_v += i_b * v_b + i_h * v_h
    p_do += i_b * do_b + i_h * do_h
    o_out = i_b * N * H + i_h
    p_dq += o_out * K
    p_dk += o_out * K
    p_ddecay += o_out * K
    p_dv += o_out * V
    p_states += i_program * SLOTS * KV
    t, m = tokens(p_order, order_h, i_h, i_c * L, N, L, ORDER)
    # Gradients of the weights are the same for every channel of the keys.
    d_weight = tl.zeros([L, L], tl.float32)
    d_weight_t = tl.zeros([L, L], tl.float32)
    d_own = tl.zeros([L], tl.float32)
    for i_v in range(0, NV):
        c_v = i_v * BV + tl.arange(0, BV)
        v = tile(p_v, v_n, t, c_v, m, V, 0.0)
        d_o = tile(p_do, do_n, t, c_v, m, V, 0.0)
        d_weight += product(d_o, tl.trans(v), DOT)
        d_weight_t += product(v, tl.trans(d_o), DOT)
        d_own += OWN * tl.sum(d_o.to(tl.float32) * v.to(tl.float32), 1)
    if NK == 1:
        weight_t, k_before, k_after = gradients_of_channels(
            p_q, p_k, p_decay, p_v, p_do, p_states, p_dq, p_dk, p_ddecay,
            d_weight, d_weight_t, d_own, t, m, 0, H, rate, scale, q_n, k_n, decay_n, v_n, do_n,
            K, V, BK, BV, NV, LEVELS, PLACE, KV, DIRECTION, DECAY, KEY, DOT,
        )  # fmt: skip
    else:
        weight_t = tl.zeros([L, L], tl.float32)
        for i_k in range(0, NK):
            more, _, _ = gradients_of_channels(
                p_q, p_k, p_decay, p_v, p_do, p_states, p_dq, p_dk, p_ddecay,
                d_weight, d_weight_t, d_own, t, m, i_k, H, rate, scale, q_n, k_n, decay_n, v_n,
                do_n, K, V, BK, BV, NV, LEVELS, PLACE, KV, DIRECTION, DECAY, KEY, DOT,
            )  # fmt: skip
            weight_t += more
    for i_v in range(0, NV):
        c_v = i_v * BV + tl.arange(0, BV)
        d_v = product(weight_t, tile(p_do, do_n, t, c_v, m, V, 0.0), DOT)
        for i_k in range(0, NK):
            c_k = i_k * BK + tl.arange(0, BK)
            o_state = c_k[:, None] * (NV * BV) + c_v[None, :]
            if NK > 1:  # one tile's factors are still there
                log2_decay, _, k = decay_and_key(
                    p_decay, decay_n, p_k, k_n, t, c_k, m, rate, K, DECAY, KEY, DOT
                )
                k_before, k_after, _, _ = key_factors(log2_decay, k, DOT)
            if DIRECTION != "backward":
                d_v += product(k_after, tl.load(p_states + QUERIES_RIGHT * KV + o_state), DOT)
            if DIRECTION != "forward":
                d_v += product(k_before, tl.load(p_states + QUERIES_LEFT * KV + o_state), DOT)
        tl.store(p_dv + t[:, None] * (H * V) + c_v[None, :], d_v.to(p_dv.dtype.element_ty),
                 mask=m[:, None] & (c_v < V)[None, :])  # fmt: skip


def backward_launches(
    call: Call,
    d_o: Tensor,
    dtype: torch.dtype | None = None,
    initial: Tensor | None = None,
    leaving: Tensor | None = None,
) -> tuple[dict[str, Tensor], list[Launch]]:
    """The gradients of q, k, decay and v that there are, not yet written, and the launches.

    dtype: of the gradients, None for that of each input. One direction: initial
    [B * H, 2, state], the state that entered the forward pass and the gradient of the one that
    left; `leaving`, the same, takes in its second slot the gradient of the one that entered.
    """
    q, c = call.q, call.configuration
    B, N, H, _ = q.shape
    given = {"q": q, "k": call.k, "decay": call.decay, "v": call.v}
    gradients = {
        name: torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
        for name, x in given.items()
        if x is not None
    }
    entering, launches = entering_segments(call, d_o, initial)
    slots = num_slots(call.direction, True)
    states = q.new_empty((B * H, c.num_chunks, slots, *c.state), dtype=c.state_dtype)
    launches.append(states_launch(call, d_o, states=states, entering=entering, leaving=leaving))
    written = (gradients.get(name, gradients["q"]) for name in given)
    launches.append(
        Launch(
            gated_linear_attention_bwd_kernel,
            B * H * c.num_chunks,
            (
                *call.tensors, d_o, states, *written, N, H, 1 / call.gate_divisor, call.scale,
                *call.strides, *d_o.stride()[:3],
            ),
            {
                **c.tiles, **call.modes, "L": CHUNK, "LEVELS": CHUNK.bit_length() - 1,
                "PLACE": anchor_place(call.direction),
            },
            c.bwd_warps,
        )
    )  # fmt: skip
    return gradients, launches
