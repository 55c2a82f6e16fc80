"""The weights of the pairs of tokens inside a chunk, and the factors that reach its two edges.

G chunks (batch, head and place together), L tokens in each, K key width, D decays (1 shared by the
directions, or 2), R directions asked for (1 or 2, forward first).

A later query i and an earlier key j weigh sum_K q_i k_j exp(s), s the sum of the log decays of
tokens j + 1 ... i; a key after its query, of tokens i ... j - 1. The product must split into a
factor of i and a factor of j. Two ways, the same values:

tree: a pair meets at the middle of the smallest aligned block of 2^m tokens that holds both, and
    the exponents of both factors are sums of terms <= 0: right for any decay. log2(L) products.
anchor: every pair meets at one place of the chunk, one product per direction. The factor of a token
    on the wrong side of it is above 1, and rounding grows with the decay in between: for chunks
    that decay mildly. `by_value` looks at the decays and chooses for each chunk.
"""

from functools import lru_cache

import torch
from torch import Tensor

# Where the anchor is taken: the log decay summed to either side of it, and of one token. Rounding
# is 2^-24 of an exponent. The gradient of a token's decay is a sum over the pairs around it, made
# as a difference of sums over all pairs: of the size of alpha against 1, so eps / alpha is lost.
# The worst mixture of gates found is at 1.8e-6 (a step of 4 instead of 2: 8e-6, no bound: 1e-2).
ANCHOR_LIMIT = 16.0
STEP_LIMIT = 2.0


def levels(
    L: int, direction: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The 0/1 tables of the tree of a chunk of L tokens with M levels.

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


def own(q: Tensor, key: Tensor, direction: str) -> Tensor:
    """A token's weight in its own output [G, L], once per direction."""
    weight = (q * key).sum(3).sum(0)
    return 2.0 * weight if direction == "bidirectional" and key.shape[0] == 1 else weight


def tree(
    q: Tensor,  # [G, L, K]
    key: Tensor,  # [1 or D, G, L, K]
    log_decay: Tensor,  # [D, G, L, K], finite
    direction: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Weights [G, L, L]; of each of the R directions, queries [G, L, K] with the decay from where
    it enters the chunk, and keys [G, L, K] with the decay to where it leaves."""
    D, G, L, K = log_decay.shape
    rows, keep, right = levels(L, direction, q.device, q.dtype)
    M = keep.shape[0]
    qa = q * log_decay.exp()  # a query's own decay stands in each of its pairs
    decay = torch.matmul(rows, log_decay).reshape(D, G, M + 2, L, K).exp()
    # Queries and keys with their factors: of the levels, of the tokens before and of those after.
    q_level, q_before, q_after = (decay * qa.unsqueeze(2)).split([M, 1, 1], 2)
    k_level, k_before, k_after = (decay * key.unsqueeze(2)).split([M, 1, 1], 2)
    if D == 2:  # forward pairs: the query is right of the key; backward pairs: left of it
        q_level = torch.where(right, q_level[:1], q_level[1:])
        k_level = torch.where(right, k_level[1:], k_level[:1])
    weight = torch.matmul(q_level[0], k_level[0].transpose(2, 3))
    weight = (weight * keep).sum(1) + torch.diag_embed(own(q, key, direction))
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    if direction != "backward":
        queries.append(q_before[0].squeeze(1))
        keys.append(k_after[0].squeeze(1))
    if direction != "forward":
        queries.append(q_after[D - 1].squeeze(1))
        keys.append(k_before[D - 1].squeeze(1))
    return weight, queries, keys


def anchor_place(L: int, direction: str) -> int:
    """The token in front of which all pairs of a chunk meet.

    The middle halves the largest exponent. One direction alone meets where it enters: a token's
    factors then hold nothing of what comes after it. Its output and gradients are free of the
    future to the last bit, as long as that does not change the choice of chunk length or form.
    """
    return 0 if direction == "forward" else L if direction == "backward" else L // 2


@lru_cache(maxsize=64)
def anchor_tables(L: int, place: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """signs [L, L]: with which sign a log decay enters a token's exponent, its own included;
    earlier, same [L, L]: whether the key comes before the query, is of the same token.

    On the CPU; kept, since making them takes as long as a product of theirs.
    """
    with torch.inference_mode(False):  # or a later training step could not save them
        token = torch.arange(L, device="cpu")  # whatever the default device
        i, t = token.unsqueeze(1), token.unsqueeze(0)
        right = t >= place
        signs = (right & (t <= i)).to(dtype) - (~right & (t > i)).to(dtype)
        return signs, t < i, t == i


def sums_beside(log_decay: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    """Summed log decay left and right of the anchor, each [D, G, 1, K]."""
    L = log_decay.shape[2]
    place = anchor_place(L, direction)
    left, right = log_decay.split([place, L - place], 2)
    return left.sum(2, keepdim=True), right.sum(2, keepdim=True)


def anchor(
    q: Tensor, key: Tensor, log_decay: Tensor, direction: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As `tree`, for chunks of mild decay on the CPU.

    With A_i the log decay summed from the anchor to token i, its own included, negative on the
    left, a forward pair weighs q_i exp(A_i) . k_j exp(-A_j), and a backward pair
    q_i alpha_i exp(-A_i) . k_j exp(A_j) / alpha_j.
    """
    D, _, L, _ = log_decay.shape
    signs, earlier, same = anchor_tables(L, anchor_place(L, direction), q.dtype)
    left, right = sums_beside(log_decay, direction)
    weight = own(q, key, direction).unsqueeze(2)
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    pairs: list[Tensor] = []
    for forward in (True, False):
        if direction == ("backward" if forward else "forward"):
            continue
        d = 0 if forward else -1
        if not pairs or D == 2:
            up = torch.matmul(signs, log_decay[d]).exp()
            down = up.reciprocal()
        if forward:
            query, k = q * up, key[d] * down
        else:
            alpha = log_decay[d].exp()
            query, k = _times(q * alpha, down), _times(key[d] / alpha, up)
        pairs.append(torch.bmm(query, k.transpose(1, 2)))
        into, out = (left[d], right[d]) if forward else (right[d], left[d])
        queries.append(_times(query, into.exp()))
        keys.append(_times(k, out.exp()))
    if direction == "bidirectional":
        others = torch.where(earlier, pairs[0], pairs[1])
    else:
        others = torch.where(earlier if direction == "forward" else earlier.t(), pairs[0], 0.0)
    return torch.where(same, weight, others), queries, keys


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x * y; in x's memory where no gradient will ask for x."""
    return x * y if torch.is_grad_enabled() else x.mul_(y)


def mild(lowest: float, L: int, direction: str) -> bool:
    """Whether every chunk of L tokens whose log decays are >= lowest may take the anchor."""
    reach = max(anchor_place(L, direction), L - anchor_place(L, direction))
    return lowest >= -min(STEP_LIMIT, ANCHOR_LIMIT / max(reach, 1))  # NaN may not


def by_value(
    q: Tensor, key: Tensor, log_decay: Tensor, direction: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As `tree`: by the anchor for the chunks that are mild, by the tree for the others."""
    L = log_decay.shape[2]
    steps = log_decay.detach()
    if mild(steps.amin().item(), L, direction):
        return anchor(q, key, log_decay, direction)  # whatever the sums
    left, right = sums_beside(steps, direction)
    mildly = (torch.minimum(left, right) >= -ANCHOR_LIMIT) & (steps >= -STEP_LIMIT)  # not NaN
    steep = (~mildly.all(3).all(2).all(0)).nonzero().squeeze(1)
    if len(steep) == 0:
        return anchor(q, key, log_decay, direction)
    if len(steep) == len(q):
        return tree(q, key, log_decay, direction)
    # Every chunk by the anchor, the steep ones as if they did not decay; then those by the tree.
    weight, queries, keys = anchor(q, key, log_decay.index_fill(1, steep, 0.0), direction)
    weights_of_steep, queries_of_steep, keys_of_steep = tree(
        q.index_select(0, steep), key.index_select(1, steep), log_decay.index_select(1, steep),
        direction,
    )  # fmt: skip
    return (
        weight.index_copy(0, steep, weights_of_steep),
        [x.index_copy(0, steep, y) for x, y in zip(queries, queries_of_steep, strict=True)],
        [x.index_copy(0, steep, y) for x, y in zip(keys, keys_of_steep, strict=True)],
    )
