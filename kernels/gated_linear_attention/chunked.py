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

import torch
import torch.nn.functional as F
from torch import Tensor


def decay_and_key(gate: Tensor, gate_divisor: float) -> tuple[Tensor, Tensor, Tensor]:
    """log alpha = logsigmoid(gate) / gate_divisor, alpha, and the key 1 - alpha.

    In float32, or float64 for a float64 gate: a 16-bit alpha near 1 would lose the key.
    """
    dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    log_decay = F.logsigmoid(gate.to(dtype)) / gate_divisor
    decay, key = _decay_and_key_of_log(log_decay)
    return log_decay, decay, key


def _decay_and_key_of_log(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp()
    key = 1.0 - decay  # for the derivative, exactly -alpha; that of expm1 is 0 where alpha < eps
    return decay, key + (-torch.expm1(log_decay) - key).detach()  # for the value, exact near 0


def pair_tables(
    L: int, direction: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The 0/1 tables of a chunk of L tokens with M levels.

    rows [(M + 2) L, L]: which log decays add up to a token's exponent, per level; then those of
        the tokens before it and those of the tokens after it.
    keep [M, L, L]: which pairs (i, j) a level owns, in the direction asked for.
    right [M, L, 1]: whether a token lies in the right half of its block.
    """
    token = torch.arange(L, device=device)
    i, j = token.unsqueeze(1), token.unsqueeze(0)
    apart = torch.bitwise_xor(i, j)
    wanted = (j < i) if direction == "forward" else (j > i) if direction == "backward" else (j != i)
    rows: list[Tensor] = []
    keep: list[Tensor] = []
    right: list[Tensor] = []
    s = 1
    while s < L:
        in_right = torch.bitwise_and(i, s) > 0
        rows.append((apart < s) & ((in_right & (j < i)) | (~in_right & (j > i))))
        keep.append((apart >= s) & (apart < 2 * s) & wanted)
        right.append(in_right)
        s *= 2
    if L == 1:  # no pairs: one empty level keeps the shapes
        rows.append(j != i)
        keep.append(j != i)
        right.append(i > 0)
    rows.append(j < i)
    rows.append(j > i)
    return torch.cat(rows).to(dtype), torch.stack(keep).to(dtype), torch.stack(right)


def states_before(
    added: Tensor, decay: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """State that enters each chunk and the state that leaves the last one, by doubling.

    added [B*H, NC, K, V]: by each chunk to the state. decay [B*H, NC, K, 1]: what it leaves of the
    state before it. `reverse` runs from the last chunk to the first.
    """
    if reverse:
        added, decay = added.flip(1), decay.flip(1)
    NC = added.shape[1]
    first = torch.zeros_like(added[:, :1]) if initial_state is None else initial_state.unsqueeze(1)
    state = torch.cat([first, added[:, : NC - 1]], 1)
    left = torch.cat([torch.ones_like(decay[:, :1]), decay[:, : NC - 1]], 1)
    s = 1
    while s < NC:
        state = torch.cat([state[:, :s], state[:, s:] + left[:, s:] * state[:, : NC - s]], 1)
        left = torch.cat([left[:, :s], left[:, s:] * left[:, : NC - s]], 1)
        s *= 2
    last = decay[:, NC - 1] * state[:, NC - 1] + added[:, NC - 1]
    return state.flip(1) if reverse else state, last


def _visit(x: Tensor, order: Tensor) -> Tensor:
    """x [..., N, H, E] with its tokens in `order` [N] or [H, N]."""
    if order.dim() == 1:
        return x.index_select(x.dim() - 3, order)
    index = order.to(torch.int64).t().unsqueeze(2)  # [N, H, 1]
    return x.gather(x.dim() - 3, index.expand(x.shape))


def _chunks(x: Tensor, NC: int, L: int) -> Tensor:
    """[D, B, N, H, E] -> [D, B*H, NC, L, E], padded with zeros: no decay, no key, no value."""
    D, B, N, H, E = x.shape
    if NC * L > N:
        x = F.pad(x, [0, 0, 0, 0, 0, NC * L - N])
    return x.transpose(2, 3).reshape(D, B * H, NC, L, E)


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
    max_length: int = 32,  # of a chunk: shorter does more state updates, longer more pairs
) -> tuple[Tensor, Tensor | None]:
    """Output [B, N, H, V] in q.dtype and, where asked for, the last state [B, H, K, V]."""
    B, N, H, K = q.shape
    V = v.shape[3]
    out_dtype = q.dtype
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    both = direction == "bidirectional"

    q, v = q.to(dtype), v.to(dtype)
    if gate is not None:
        log_alpha, alpha, key = decay_and_key(gate.to(dtype), gate_divisor)
    else:
        log_alpha = torch.zeros_like(q) if log_decay is None else log_decay.to(dtype)
        # exp(-1e4) is 0 in float64 too: changes no value, keeps -inf out of sums with 0 * -inf
        log_alpha = log_alpha.clamp_min(-1e4)
        alpha, key = _decay_and_key_of_log(log_alpha)
    if k is not None:
        key = k.to(dtype)
    if order is not None:
        q, v, key = _visit(q, order), _visit(v, order), _visit(key, order)
        log_alpha, alpha = _visit(log_alpha, order), _visit(alpha, order)
    if log_alpha.dim() == 4:
        log_alpha, alpha = log_alpha.unsqueeze(0), alpha.unsqueeze(0)
    if key.dim() == 4:
        key = key.unsqueeze(0)
    own = (q * key).sum(4, keepdim=True).sum(0, keepdim=True)  # a token's weight in its own output
    if both and key.shape[0] == 1:
        own = 2.0 * own  # once per direction

    NC = (N + max_length - 1) // max_length
    L = (N + NC - 1) // NC  # 196 tokens are 7 chunks of 28: no padding
    rows, keep, right = pair_tables(L, direction, q.device, dtype)
    M = keep.shape[0]
    qa, key = _chunks(q * alpha, NC, L), _chunks(key, NC, L)  # [D, B*H, NC, L, K]
    log_alpha = _chunks(log_alpha, NC, L)
    v, own = _chunks(v.unsqueeze(0), NC, L)[0], _chunks(own, NC, L)[0]
    D = log_alpha.shape[0]

    exponent = torch.matmul(rows, log_alpha).reshape(D, B * H, NC, M + 2, L, K)
    decay = exponent.exp()
    # Queries and keys with their factors: of the levels, of the tokens before and of those after.
    q_level, q_before, q_after = (decay * qa.unsqueeze(3)).split([M, 1, 1], 3)
    k_level, k_before, k_after = (decay * key.unsqueeze(3)).split([M, 1, 1], 3)
    if D == 2:  # forward pairs: the query is right of the key; backward pairs: left of it
        q_level = torch.where(right, q_level[:1], q_level[1:])
        k_level = torch.where(right, k_level[1:], k_level[:1])
    weight = torch.matmul(q_level[0], k_level[0].transpose(3, 4))
    weight = (weight * keep).sum(2) + torch.diag_embed(own.squeeze(3))  # [B*H, NC, L, L]
    o = torch.matmul(weight, v)

    initial = initial_state
    if initial is not None:
        initial = initial.to(dtype).reshape(B * H, K, V)
    last: Tensor | None = None
    if NC > 1 or initial is not None or output_final_state:
        chunk_decay = log_alpha.sum(3).exp().unsqueeze(4)  # [D, B*H, NC, K, 1]
        if direction != "backward":
            added = torch.matmul(k_after[0].squeeze(2).transpose(2, 3), v)
            state, last = states_before(added, chunk_decay[0], initial, False)
            o = o + torch.matmul(q_before[0].squeeze(2), state)
        if direction != "forward":
            added = torch.matmul(k_before[D - 1].squeeze(2).transpose(2, 3), v)
            state, last = states_before(added, chunk_decay[D - 1], initial, True)
            o = o + torch.matmul(q_after[D - 1].squeeze(2), state)

    o = o.reshape(B, H, NC * L, V)[:, :, :N].transpose(1, 2)
    if order is not None:
        o = _visit(o, torch.argsort(order, dim=-1))
    o = (o * scale).to(out_dtype)
    if output_final_state and last is not None:
        return o, last.reshape(B, H, K, V)
    return o, None
