"""EVA, efficient attention via control variates, as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads,
K = C / H width of queries, keys and values per head; NW windows of LW tokens, NG groups of LG
tokens, the last of a row or column filled up with tokens that do not exist.

With xi(x, w) = exp(w . x - |x|^2 / 2) and w standard normal, E xi(q, w) xi(k, w) = exp(q . k), and

    xi(q, w) xi(k, w) N(w; 0, I) = exp(q . k) N(w; q + k, I)

so that the mean of beta(w) = sum_m xi(k_m, w) v_m / sum_m xi(k_m, w) over the mixture
sum_m softmax_m(q . k_m) N(w; q + k_m, I) is softmax attention: randomized attention, arXiv
2204.04667. Of any partition of the tokens it holds in each part: with tokens E by themselves and
the others in groups P_c, Z_c = sum_{m in P_c} exp(q . k_m) and Z the sum of all,

    softmax attention = sum_{m in E} exp(q . k_m) / Z v_m + sum_c Z_c / Z E beta_c(w_c).

EVA takes one w_c for all queries, and exp(q . key_c) of a learnt key for Z_c.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from .mixer import TokenMixer, check_rope, check_sizes
from .pos_embed import rope2d

jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag


def log_feature(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """log xi(scale^0.5 x, scale^0.5 w) = scale * (w . x - |x|^2 / 2) over the last dimension.

    In float32 at least.
    """
    x = x if x.dtype == torch.float64 else x.float()
    return scale * (x * (w.to(x.dtype) - 0.5 * x)).sum(-1)


def group_values(k: Tensor, v: Tensor, w: Tensor, present: Tensor, scale: float) -> Tensor:
    """beta_c = sum_m xi(k_m, w_c) v_m / sum_m xi(k_m, w_c) over the tokens of each group.

    k, v [..., NG, LG, K], w [..., NG, K], present [NG, LG] -> [..., NG, K] in v's dtype. A group of
    no token has any mean of v.
    """
    logits = log_feature(k, w.unsqueeze(-2), scale)
    logits = logits.masked_fill(~present, -3.0e38)  # -inf would leave a group of no token nan
    return (logits.softmax(-1).unsqueeze(-1) * v).sum(-2).to(v.dtype)


def control_variate_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    group_k: Tensor,
    group_v: Tensor,
    present: Tensor,
    group_key: Tensor,
    w: Tensor,
    group_bias: Tensor,
    scale: float,
) -> Tensor:
    """Queries over exact tokens and groups, one softmax over both.

        o_i = sum_j p_ij v_j + sum_c p_ic beta_c
        p_i = softmax of {scale q_i . k_j + bias_ij} and {scale q_i . group_key_c + group_bias_ic}

    Softmax attention over all tokens, exactly, if exact tokens (a bias of -inf leaves one out) and
    groups (likewise) are disjoint and together all, and each group c
    - is of one token with group_key_c = k_m, whatever w is; or
    - has equal keys, group_key_c = k_m and group_bias log |P_c|, whatever w is.
    Its expectation is softmax attention, for one query, if group_bias_ic is
    log Z_c - scale q_i . group_key_c and w_c is drawn from its mixture (of q, k and w times
    scale^0.5).

    Args:
        q: [B, NW, H, LQ, K], queries by window. k, v: [B, NW, H, LW, K], what they see exactly.
        bias: broadcasts to [NW, H, LQ, LW]. group_bias: to [NW, H, LQ, NG].
        group_k, group_v: [B, H, NG, LG, K]; present: [NG, LG], whether there is such a token.
        group_key, w: [B, H, NG, K].
    Returns:
        [B, NW, H, LQ, K].
    """
    B, NW, H, LQ, K = q.shape
    NG, LW = group_key.shape[2], k.shape[3]
    beta = group_values(group_k, group_v, w, present, scale).unsqueeze(1)
    keys = torch.cat([k, group_key.unsqueeze(1).expand(B, NW, H, NG, K).to(k.dtype)], 3)
    values = torch.cat([v, beta.expand(B, NW, H, NG, K)], 3)
    mask = torch.cat([bias.expand(NW, H, LQ, LW), group_bias.expand(NW, H, LQ, NG)], 3)
    o = F.scaled_dot_product_attention(  # which computes its softmax in float32 at least
        q.flatten(1, 2), keys.flatten(1, 2), values.flatten(1, 2),
        mask.flatten(0, 1).unsqueeze(0).to(q.dtype), scale=scale,
    )  # fmt: skip
    return o.reshape(B, NW, H, LQ, K)


@register_notrace_function
def group_side(Gh: int, Gw: int, landmarks: int, most: int) -> int:
    """The side of the groups: floor(sqrt(N / landmarks)), at least 1 and, unless 0, `most`."""
    if torch.jit.is_scripting():
        side = max(1, int(math.sqrt(Gh * Gw // landmarks)))
        return min(side, most) if most > 0 else side
    else:
        tokens: Any = Gh * Gw
        if isinstance(tokens, int):
            side = max(1, math.isqrt(tokens // landmarks))
            return min(side, most) if most > 0 else side
        root: Any = (tokens // landmarks + 0.5) ** 0.5  # between squares: no rounding matters
        least: Any = torch.sym_max(1, torch.sym_int(root))
        return torch.sym_min(least, most) if most > 0 else least  # pyright: ignore[reportReturnType]


def squares(x: Tensor, side: int) -> Tensor:
    """A map [B, Gh, Gw, E] as squares [B, count, side * side, E], both in raster order.

    Tokens beyond the map are zeros.
    """
    B, Gh, Gw, E = x.shape
    if not torch.jit.is_scripting() and not isinstance(Gh * Gw * side, int):
        return _gathered(x, side)
    rows, columns = (Gh + side - 1) // side, (Gw + side - 1) // side
    x = F.pad(x, [0, 0, 0, columns * side - Gw, 0, rows * side - Gh])
    x = x.reshape(B, rows, side, columns, side, E).transpose(2, 3)
    return x.reshape(B, rows * columns, side * side, E)


@torch.jit.unused
def _gathered(x: Tensor, side: int) -> Tensor:
    """`squares` in a graph for any size, with an empty one behind the others.

    Squares of any side are of (side + 1)^2 tokens, the last row and column of each empty. So no
    length that may be another can be 1: a graph would keep to that for good.
    """
    B, Gh, Gw, E = x.shape
    rows, columns = (Gh + side - 1) // side, (Gw + side - 1) // side
    slots = side if isinstance(side, int) else side + 1
    square = torch.arange(rows * columns + 1, device=x.device).unsqueeze(1)
    slot = torch.arange(slots * slots, device=x.device).unsqueeze(0)
    # ONNX has no remainder by a length that is not known
    row, i = square // columns, slot // slots
    column, j = square - row * columns, slot - i * slots
    r, c = row * side + i, column * side + j
    there = (i < side) & (j < side) & (r < Gh) & (c < Gw)
    place = (r.clamp_max(Gh - 1) * Gw + c.clamp_max(Gw - 1)).flatten()
    found = x.flatten(1, 2).index_select(1, place)
    found = found.reshape(B, rows * columns + 1, slots * slots, E)
    return found * there.unsqueeze(2).to(x.dtype)


def from_squares(x: Tensor, side: int, Gh: int, Gw: int) -> Tensor:
    """The map [B, Gh, Gw, E] of its squares [B, count, side * side, E]."""
    B, _, _, E = x.shape
    rows, columns = (Gh + side - 1) // side, (Gw + side - 1) // side
    if not torch.jit.is_scripting() and not isinstance(Gh * Gw, int):
        r = torch.arange(Gh, device=x.device).unsqueeze(1)
        c = torch.arange(Gw, device=x.device).unsqueeze(0)
        place = (r // side * columns + c // side) * side * side + r % side * side + c % side
        return x.flatten(1, 2).index_select(1, place.flatten()).reshape(B, Gh, Gw, E)
    x = x.reshape(B, rows, columns, side, side, E).transpose(2, 3)
    return x.reshape(B, rows * side, columns * side, E)[:, :Gh, :Gw]


def groups(x: Tensor, side: int, window: int) -> Tensor:
    """A map [B, Gh, Gw, E] as groups [B, NG, LG, E]; window > 0 cuts them at windows' borders."""
    if window == 0:
        return squares(x, side)
    B, _, _, E = x.shape
    x = squares(x, window)
    NW = x.shape[1]
    x = squares(x.reshape(B * NW, window, window, E), side)
    return x.reshape(B, NW * x.shape[1], x.shape[2], E)


def of_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, squares, tokens, C] -> [B, H, squares, tokens, K]."""
    B, S, L, C = x.shape
    return x.reshape(B, S, L, num_heads, C // num_heads).permute(0, 3, 1, 2, 4)


def existing(x: Tensor) -> Tensor:
    """Ones [1, Gh, Gw, 1] of the map x [B, Gh, Gw, C]: padded, they say where a token is."""
    one = x[:1, :, :, :1]
    return torch.ones_like(one if x.dtype == torch.float64 else one.float())


@register_notrace_function
def group_mean(x: Tensor, landmarks: int, window: int, Gh: int, Gw: int) -> Tensor:
    """The mean over the tokens of each group, [B, N, H, K] -> [B, H, NG, K]; 0 of none."""
    B, _, H, K = x.shape
    x = x.reshape(B, Gh, Gw, H * K)
    side = group_side(Gh, Gw, landmarks, window)
    count = groups(existing(x), side, window).sum(2).clamp_min(1.0)  # [1, NG, 1]
    wide = x if x.dtype == torch.float64 else x.float()
    mean = groups(wide, side, window).sum(2) / count
    return mean.reshape(B, mean.shape[1], H, K).transpose(1, 2).to(x.dtype)


@register_notrace_function
def draw(mean: Tensor, noisy: bool) -> Tensor:
    """mean, or one sample of the normal distribution around it with variance 1."""
    return mean + torch.randn_like(mean) if noisy else mean


@register_notrace_function
def relative_bias(table: Tensor, window: int) -> Tensor:
    """The bias of token j for token i of a window, table [(2 window - 1)^2, H] -> [H, LW, LW].

    Entry (2 window - 1) (dr + window - 1) + dc + window - 1 for row and column offsets dr and dc.
    """
    place = torch.arange(window * window, device=table.device)
    row, column = place // window, place % window
    dr = row.unsqueeze(1) - row.unsqueeze(0) + window - 1
    dc = column.unsqueeze(1) - column.unsqueeze(0) + window - 1
    return table[dr * (2 * window - 1) + dc].permute(2, 0, 1)


@register_notrace_function
def eva_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_key: Tensor,
    w: Tensor,
    table: Tensor,
    window: int,
    landmarks: int,
    exact_partition: bool,
    count_tokens: bool,
    Gh: int,
    Gw: int,
) -> Tensor:
    """`control_variate_attention` of every token of a map over its window and all groups.

    q, k, v [B, N, H, K], group_key, w [B, H, NG, K], table as in relative_bias -> [B, N, H, K].
    """
    B, N, H, K = q.shape
    C = H * K
    maps = [x.reshape(B, Gh, Gw, C) for x in [q, k, v]]
    windows = [of_heads(squares(x, window), H).transpose(1, 2) for x in maps]
    here = existing(maps[0])
    inside = squares(here, window).squeeze(3) > 0  # [1, NW, LW]
    NW, LW = inside.shape[1], inside.shape[2]
    no: float = float("-inf")
    bias = relative_bias(table, window).unsqueeze(0)
    bias = bias.masked_fill(~inside.reshape(NW, 1, 1, LW), no)
    border = window if exact_partition else 0
    side = group_side(Gh, Gw, landmarks, border)
    present = groups(here, side, border).squeeze(3).squeeze(0)  # [NG, LG]
    count = present.sum(1)
    if count_tokens:
        group_bias = count.log().reshape(1, 1, 1, -1)
    else:
        group_bias = torch.zeros_like(count).masked_fill(count == 0, no).reshape(1, 1, 1, -1)
    if exact_partition:  # groups stand window by window
        NG = count.shape[0]
        owner = torch.arange(NG, device=q.device) // (NG // NW)
        own = owner.unsqueeze(0) == torch.arange(NW, device=q.device).unsqueeze(1)
        group_bias = group_bias.expand(NW, 1, 1, NG).masked_fill(own.reshape(NW, 1, 1, NG), no)
    o = control_variate_attention(
        windows[0], windows[1], windows[2], bias,
        of_heads(groups(maps[1], side, border), H), of_heads(groups(maps[2], side, border), H),
        present > 0,
        group_key, w, group_bias.to(bias.dtype), K**-0.5,
    )  # fmt: skip
    o = from_squares(o.transpose(2, 3).reshape(B, NW, LW, C), window, Gh, Gw)
    return o.reshape(B, N, H, K)


class EVAAttentionMixer(TokenMixer):
    """EVA over the tokens of a map.

        x = SiLU(conv(x))
        q, k, v = x W_Q + b_Q, x W_K + b_K, x W_V + b_V
        query_c = LN(W_q mean_{P_c} q + b_q),  key_c = LN(W_k mean_{P_c} k + b_k)   per head
        w_c = (query_c + key_c) / 2, plus standard normal noise in training
        beta_c = sum_{m in P_c} softmax_m(K^-0.5 (w_c . k_m - |k_m|^2 / 2)) v_m
        o_i = sum_{j in window(i)} p_ij v_j + sum_c p_ic beta_c
        p_i = softmax of {K^-0.5 q_i . k_j + r_ij, j in window(i)} and {K^-0.5 q_i . key_c, all c}
        y = o W_O + b_O

    Windows are squares of the map, r is learnt for each offset in one. Groups P_c are squares of
    side floor(sqrt(N / landmarks)), at least 1. Both may be cut at the map's right and lower
    border, so that any map has them. Cost and memory grow with N (window^2 + landmarks).

    Source: EVA, arXiv 2302.04542, in the form that its authors released for vision: the tokens of
    the window count once more in their groups, and no key_c is told how many tokens it stands for.
    In the units of the theory, q and k times K^-0.25, that w has K^-0.5 of the variance and half of
    the mean. Differs: the convolution, maps of any size (published: multiples of the window), and
    an entry of its own for every offset of r (the released index gives 97 to the 169 of window 7).
    The paper's autoregressive form is another module. Decided here, as no text settles it: W_q and
    W_k shared by the heads start as all others, r is not decayed, a bias in W_O as in DeiT.

    Args:
        dim, num_heads, conv, scans: see TokenMixer; a scan changes nothing.
        direction: "bidirectional".
        window: side of a window.
        landmarks: about how many groups; up to four times as many where the root is rounded, and
            more on a narrow map, whose groups are as wide as it.
        noise: sample w in training.
        exact_partition: cut the groups at the windows' borders as well, and leave those in the
            token's own window out of its softmax, so that every token counts once, as in the
            theory. At least one group in each window, so their number grows with N / window^2.
        count_tokens: add log |P_c| to the score of a group, for the tokens that it stands for.
        rope: turn queries and keys by their position, see rope2d; needs K divisible by 4. The
            learnt keys of groups are of turned ones, and no function of a difference of positions.
    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        scans: str | Sequence[str] = "raster",
        window: int = 7,
        landmarks: int = 49,
        noise: bool = True,
        exact_partition: bool = False,
        count_tokens: bool = False,
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, **dd)
        if direction != "bidirectional":
            raise ValueError(
                f"direction={direction!r}: EVA hears of all tokens; accepted: bidirectional"
            )
        check_sizes(window=window, landmarks=landmarks)
        self.width = dim // num_heads
        self.window = window
        self.landmarks = landmarks
        self.noise = noise
        self.exact_partition = exact_partition
        self.count_tokens = count_tokens
        self.border = window if exact_partition else 0
        self.rope = check_rope(rope, self.width, dim, num_heads)
        self.in_proj = nn.Linear(dim, 3 * dim, **dd)
        self.query_proj = nn.Linear(self.width, self.width, **dd)
        self.query_norm = nn.LayerNorm(self.width, **dd)
        self.key_proj = nn.Linear(self.width, self.width, **dd)
        self.key_norm = nn.LayerNorm(self.width, **dd)
        self.relative_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads, **dd))
        self.out_proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        trunc_normal_(self.relative_bias, std=0.02)

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW should not decay although they are matrices."""
        return {"relative_bias"}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, C = x.shape
        N, H, K = Gh * Gw, self.num_heads, self.width
        q, k, v = self.in_proj(self.conv(x)).reshape(B, N, 3, H, K).unbind(2)
        if self.rope:
            q, k = rope2d(q, Gh, Gw), rope2d(k, Gh, Gw)
        query = group_mean(q, self.landmarks, self.border, Gh, Gw)
        key = group_mean(k, self.landmarks, self.border, Gh, Gw)
        query = self.query_norm(self.query_proj(query))
        key = self.key_norm(self.key_proj(key))
        w = draw(0.5 * (query + key), self.training and self.noise)
        o = eva_attention(
            q, k, v, key, w, self.relative_bias, self.window, self.landmarks,
            self.exact_partition, self.count_tokens, Gh, Gw,
        )  # fmt: skip
        return self.out_proj(o.reshape(B, Gh, Gw, C))
