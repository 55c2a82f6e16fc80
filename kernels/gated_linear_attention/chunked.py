"""Gated linear attention in chunks: the portable fast form, in plain scriptable PyTorch.

B batch, N tokens, H heads, K key width per head, V value width per head, L chunk length, NC number
of chunks, D decays (1 shared by the directions, or 2). State S [B, H, K, V].

The weight of token j in the output of token i is q_i . (prod alpha between them) . k_j. Written as
one quotient of cumulative products it overflows, and as a difference of cumulative sums it cancels.
Here every exponent is a sum of terms <= 0, one product of a 0/1 table with log alpha: nothing is
subtracted, clamped or divided, so autograd's gradients are free of cancellation too.

Inside a chunk, a pair (i, j) belongs to the level s = 2^m <= (i xor j) < 2s. The two halves of an
aligned block of 2s tokens meet at its middle, and the pair's decay splits there into a factor of i
and a factor of j: both directions need the same factors. Between chunks, states are combined in
log2(NC) doubling steps. There is no loop over tokens.
"""

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from metala_vision.kernels._portable import decay_and_key, key_of, plainly_eager
from metala_vision.kernels.gated_linear_attention.pairs import anchor, by_value, mild, tree


def states_before(
    added: Tensor, decay: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """State that enters each chunk and the state that leaves the last one, by doubling.

    added [B*H, NC, K, V]: by each chunk to the state. decay [B*H, NC, K, 1]: what it leaves of the
    state before it. `reverse` runs from the last chunk to the first.
    """
    NC = added.shape[1]
    first = torch.zeros_like(added[:, :1]) if initial_state is None else initial_state.unsqueeze(1)
    one = torch.ones_like(decay[:, :1])
    if reverse:
        state, left = torch.cat([added[:, 1:], first], 1), torch.cat([decay[:, 1:], one], 1)
    else:
        state, left = torch.cat([first, added[:, :-1]], 1), torch.cat([one, decay[:, :-1]], 1)
    s = 1
    while s < NC:  # state holds the sum over the s chunks before a chunk: take the s before those
        e = NC - s
        if reverse:
            before = left[:, :e] * state[:, s:]
            left = torch.cat([left[:, :e] * left[:, s:], left[:, e:]], 1)
            if torch.is_grad_enabled():
                state = torch.cat([state[:, :e] + before, state[:, e:]], 1)
            else:
                state[:, :e].add_(before)
        else:
            before = left[:, s:] * state[:, :e]
            left = torch.cat([left[:, :s], left[:, s:] * left[:, :e]], 1)
            if torch.is_grad_enabled():
                state = torch.cat([state[:, :s], state[:, s:] + before], 1)
            else:
                state[:, s:].add_(before)
        s *= 2
    last = 0 if reverse else NC - 1
    return state, decay[:, last] * state[:, last] + added[:, last]


def _all_mild(
    gate: Tensor | None, log_decay: Tensor | None, gate_divisor: float, direction: str
) -> bool:
    """Whether every chunk of 64 tokens may take the anchor, by the lowest decay of all."""
    lowest = torch.zeros((), device="cpu")
    if gate is not None:
        lowest = F.logsigmoid(gate.detach().amin().double()) / gate_divisor
    elif log_decay is not None:
        lowest = log_decay.detach().amin()
    return mild(lowest.item(), 64, direction)


def states_by_table(
    added: Tensor, log_decay: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `states_before`, from log_decay [B*H, NC, K], in a graph that is the same for every NC.

    Of the weight of each chunk for each other one, NC^2 K of them: 0.1 GB a head at 512 chunks.
    """
    if reverse:
        added, log_decay = added.flip(1), log_decay.flip(1)
    NC = added.shape[1]
    chunk = torch.arange(NC, device=added.device)
    later, earlier = chunk.view(NC, 1, 1), chunk.view(1, NC, 1)
    # Sums over the chunks between two, from terms <= 0 each: nothing is subtracted.
    before = log_decay.roll(1, 1).unsqueeze(2)  # [B*H, NC, 1, K], of the chunk before
    between = torch.where(later > earlier + 1, before, 0.0).cumsum(1)
    weight = torch.where(later > earlier, between.exp(), 0.0)  # [B*H, NC, NC, K]
    state = torch.einsum("bijk,bjkv->bikv", weight, added)
    if initial_state is not None:
        reached = torch.where(later > 0, before, 0.0).cumsum(1).exp()  # [B*H, NC, 1, K]
        state = state + reached.transpose(2, 3) * initial_state.unsqueeze(1)
    last = log_decay[:, -1].exp().unsqueeze(2) * state[:, -1] + added[:, -1]
    return state.flip(1) if reverse else state, last


def _visit(x: Tensor, order: Tensor) -> Tensor:
    """x [..., N, H, E] with its tokens in `order` [N] or [H, N]."""
    if order.dim() == 1:
        return x.index_select(x.dim() - 3, order)
    index = order.to(torch.int64).t().unsqueeze(2)  # [N, H, 1]
    return x.gather(x.dim() - 3, index.expand(x.shape))


def _chunks(
    x: Tensor,
    order: Tensor | None,
    NC: int,
    L: int,
    padded: bool,
    dtype: torch.dtype,
    padding: float = 0.0,
) -> Tensor:
    """x [B, N, H, E] or [D, B, N, H, E] in `order` -> [D, B*H*NC, L, E]."""
    if order is not None:
        x = _visit(x, order)
    if x.dim() == 4:
        x = x.unsqueeze(0)
    D, B, N, H, E = x.shape
    x = x.to(dtype)
    if padded:
        x = F.pad(x, [0, 0, 0, 0, 0, NC * L - N], value=padding)
    return x.transpose(2, 3).reshape(D, B * H * NC, L, E)


def chunked(
    q: Tensor,  # [B, N, H, K]
    v: Tensor,  # [B, N, H, V]
    k: Tensor | None,  # [B, N, H, K]; None: 1 - alpha
    gate: Tensor | None,  # [B, N, H, K], or [2, B, N, H, K] for (forward, backward)
    log_decay: Tensor | None,  # the same shapes, natural logarithm
    gate_divisor: float,
    scale: float,
    direction: str,
    order: Tensor | None,  # [N] or [H, N]
    initial_state: Tensor | None,  # [B, H, K, V]
    output_final_state: bool,
    max_length: int = 0,  # of a chunk: shorter does more state updates, longer more pairs
) -> tuple[Tensor, Tensor | None]:
    """Output [B, N, H, V] in q.dtype and, where asked for, the last state [B, H, K, V]."""
    B, N, H, K = q.shape
    V = v.shape[3]
    out_dtype = q.dtype
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    look = False  # at values
    all_mild = False
    any_size = False  # a graph for every N: nothing may depend on the number of chunks
    limit = max_length if max_length > 0 else 32
    if not torch.jit.is_scripting():
        look = q.device.type == "cpu" and plainly_eager(q)  # elsewhere it would wait
        any_size = isinstance(N, torch.SymInt)
        if look and max_length == 0 and _all_mild(gate, log_decay, gate_divisor, direction):
            all_mild = True
            limit = 64  # the anchor's pairs cost less than the tree's: fewer chunks, fewer states

    if any_size:
        L = 32
        NC = N // L + 1  # always some padding, or the graph would hold for multiples of 32 only
    else:
        NC = (N + limit - 1) // limit
        L = (N + NC - 1) // NC  # 196 tokens are 4 chunks of 49: no padding
    padded = any_size or NC * L > N
    q = scale * _chunks(q, order, NC, L, padded, dtype)[0]
    v = _chunks(v, order, NC, L, padded, dtype)[0]
    # Padding: no decay, no key, no value. exp(-1e4) is 0 in float64 too: it changes no value, and
    # keeps -inf out of sums with 0 * -inf.
    if gate is not None:
        gate = _chunks(gate, order, NC, L, padded, dtype, inf)
        log_alpha, key = decay_and_key(gate, gate_divisor)
        if not all_mild:
            log_alpha = log_alpha.clamp_min(-1e4)
    elif log_decay is not None:
        log_alpha = _chunks(log_decay, order, NC, L, padded, dtype)
        if not all_mild:
            log_alpha = log_alpha.clamp_min(-1e4)
        key = q if k is not None else key_of(log_alpha)
    else:
        log_alpha, key = torch.zeros_like(q).unsqueeze(0), q
    if k is not None:
        key = _chunks(k, order, NC, L, padded, dtype)
    D = log_alpha.shape[0]
    if torch.jit.is_scripting():
        weight, queries, keys = tree(q, key, log_alpha, direction)
    else:
        pairs = anchor if all_mild else by_value if look else tree
        weight, queries, keys = pairs(q, key, log_alpha, direction)
    o = torch.matmul(weight, v)

    initial = initial_state
    if initial is not None:
        initial = initial.to(dtype).reshape(B * H, K, V)
    last: Tensor | None = None
    if any_size or NC > 1 or initial is not None or output_final_state:
        chunk_log_decay = log_alpha.sum(2).reshape(D, B * H, NC, K)
        for r in range(len(keys)):
            added = torch.matmul(keys[r].transpose(1, 2), v).reshape(B * H, NC, K, V)
            reverse = direction == "backward" or r == 1
            log_decays = chunk_log_decay[min(r, D - 1)]
            if any_size:
                state, last = states_by_table(added, log_decays, initial, reverse)
            else:
                state, last = states_before(added, log_decays.exp().unsqueeze(3), initial, reverse)
            state = state.reshape(-1, K, V)
            if look and not torch.is_grad_enabled():
                o.baddbmm_(queries[r], state)
            else:
                o = torch.baddbmm(o, queries[r], state)

    o = o.reshape(B, H, NC * L, V)[:, :, :N].transpose(1, 2)
    if order is not None:
        o = _visit(o, torch.argsort(order, dim=-1))
    o = o.to(out_dtype)
    if output_final_state and last is not None:
        return o, last.reshape(B, H, K, V)
    return o, None
