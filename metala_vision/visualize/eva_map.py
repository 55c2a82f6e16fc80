"""What each token takes from each other in EVA: the map of layers.eva_attention.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens, H heads, K width per head, NG groups, T tokens
asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def eva_map(
    q: Tensor, k: Tensor, v: Tensor, group_key: Tensor, w: Tensor, table: Tensor, window: int,
    landmarks: int, exact_partition: bool, count_tokens: bool, Gh: int, Gw: int,
    tokens: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """map[t, s] = p_ts + sum_c p_tc softmax_{s in P_c}(K^-0.5 (w_c . k_s - |k_s|^2 / 2)).

    p_ts of the tokens s in t's window and p_tc of the groups are one softmax, see
    layers.EVAAttentionMixer; the arguments are those of layers.eva_attention.eva_attention.

    Returns:
        [1, B, H, T, N], float64.
    """
    K = q.shape[3]
    queries, keys = (x.double().transpose(1, 2) for x in (q, k))
    place = torch.arange(Gh * Gw, device=q.device)
    row, column = place // Gw, place % Gw
    side = max(1, int((Gh * Gw // landmarks + 0.5) ** 0.5))
    window_of = row // window * Gw + column // window
    key_of = row // side * Gw + column // side
    if exact_partition:  # window by window, and in each its groups
        side = min(side, window)
        inner = row % window // side * window + column % window // side
        key_of = window_of * window**2 + inner
    member = key_of.unique().unsqueeze(1) == key_of  # [NG, N]
    group_key, w = (
        _without_empty(x, exact_partition, Gh, Gw, window, side) for x in (group_key, w)
    )

    offset = (row.unsqueeze(1) - row + window - 1) * (2 * window - 1)
    offset = offset + column.unsqueeze(1) - column + window - 1
    near = window_of.unsqueeze(1) == window_of
    bias = table.double()[offset.where(near, 0)].permute(2, 0, 1)
    exact = K**-0.5 * queries @ keys.mT + bias
    exact = exact.masked_fill(~near, float("-inf"))
    grouped = K**-0.5 * queries @ group_key.double().mT  # [B, H, N, NG]
    if count_tokens:
        grouped = grouped + member.sum(1).double().log()
    if exact_partition:
        own = window_of.unsqueeze(1) == window_of[member.int().argmax(1)]
        grouped = grouped.masked_fill(own, float("-inf"))
    asked = place if tokens is None else torch.tensor(list(tokens), device=q.device)
    p = torch.cat([exact, grouped], 3)[:, :, asked].softmax(3)

    features = K**-0.5 * (w.double() @ keys.mT - 0.5 * keys.square().sum(3).unsqueeze(2))
    shares = features.masked_fill(~member, float("-inf")).softmax(3)  # [B, H, NG, N]
    return (p[..., : Gh * Gw] + p[..., Gh * Gw :] @ shares).unsqueeze(0)


def _without_empty(
    x: Tensor, exact_partition: bool, Gh: int, Gw: int, window: int, side: int
) -> Tensor:
    """x [B, H, groups, K] of the groups that have tokens; in cut windows, some have none."""
    if not exact_partition:
        return x
    a = -(-window // side)
    wide, high = -(-Gw // window), -(-Gh // window)
    kept = [
        ((i * wide + j) * a + r) * a + c
        for i in range(high) for j in range(wide) for r in range(a) for c in range(a)
        if i * window + r * side < Gh and j * window + c * side < Gw
    ]  # fmt: skip
    return x[:, :, kept]
