"""Mamba's S6, a selective state space model, as a token mixer.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, E = expand C channels
of the recurrence, M states of a channel, R width between the two projections of the step size,
D directions, G groups of channels with a scan order each.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from metala_vision.kernels.selective_scan import MAX_STATES, selective_scan_op

from .conv import TokenConv
from .mixer import TokenMixer, check_sizes
from .scan import token_order

jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag
STEP_SIZES = (1e-3, 0.1)  # at the start, uniform in their logarithm


@register_notrace_function
def scan_tokens(
    u: Tensor, delta: Tensor, A_log: Tensor, k: Tensor, q: Tensor, skip: Tensor, dt_bias: Tensor,
    direction: str, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """`selective_scan_op` with A = -exp(A_log), along order [N] or, by group, [G, N].

    u, delta [B, N, E], A_log [E, M], k, q [B, N, M], skip, dt_bias [E], or [2, ...] by direction
    -> y [B, N, E].
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    A = -torch.exp(A_log.to(dtype))
    if order is None or order.dim() == 1:
        return selective_scan_op(u, delta, A, k, q, skip, dt_bias, direction, order)
    G = order.shape[0]
    E = u.shape[-1] // G
    groups: list[Tensor] = []
    for i in range(G):
        c = slice(i * E, i * E + E)
        groups.append(
            selective_scan_op(
                u[..., c], delta[..., c], A[..., c, :], k, q, skip[..., c], dt_bias[..., c],
                direction, order[i],
            )
        )  # fmt: skip
    return torch.cat(groups, 2)


def check_mamba(expand: int, d_state: int, dt_rank: int | None) -> None:
    """A ValueError that names the value which is no whole number >= 1, or too large."""
    check_sizes(expand=expand, d_state=d_state, dt_rank=1 if dt_rank is None else dt_rank)
    if d_state > MAX_STATES:
        raise ValueError(f"d_state must be at most {MAX_STATES}, got {d_state}")


class SelectiveInput(nn.Module):
    """What one direction of Mamba makes of the map u [B, Gh, Gw, E], and its own parameters.

        u = SiLU(conv(u))
        r, k, q = u W_x                                 [R], [M], [M]
        delta = r W_dt                                  before bias and softplus

    Args:
        width: E. d_state: M. dt_rank: R.
        conv, direction: see TokenConv; with a bias.
    """

    def __init__(
        self, width: int, d_state: int, dt_rank: int, conv: str, direction: str, device=None,
        dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sizes = [dt_rank, d_state, d_state]
        self.conv = TokenConv(width, conv, direction, bias=True, **dd)
        self.x_proj = nn.Linear(width, dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_weight = nn.Parameter(torch.empty(width, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(width, **dd))
        self.A_log = nn.Parameter(torch.empty(width, d_state, **dd))
        self.skip = nn.Parameter(torch.empty(width, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module owns directly."""
        low, high = (math.log(x) for x in STEP_SIZES)
        step = torch.empty(self.dt_bias.shape, dtype=torch.float64).uniform_(low, high).exp()
        with torch.no_grad():
            nn.init.uniform_(self.dt_weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus^-1
            self.A_log.copy_(torch.arange(1, self.sizes[1] + 1).log().expand(self.A_log.shape))
            nn.init.ones_(self.skip)

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors do not decay."""
        return {"A_log", "skip"}

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u, delta [B, N, E], A_log, k, q [B, N, M], skip and dt_bias."""
        u = self.conv(u).flatten(1, 2)
        r, k, q = self.x_proj(u).split(self.sizes, dim=2)
        delta = F.linear(r, self.dt_weight)
        return u, delta, self.A_log, k, q, self.skip, self.dt_bias


class MambaMixer(TokenMixer):
    """Mamba's selective state space model over the tokens of a map.

        u, z = x W_in                                                [E] each
        u = SiLU(conv(u))
        step_t = softplus(u_t W_x1 W_dt + b_dt)                      [E]
        h_t = exp(-step_t e^A_log) * h_{t-1} + (step_t u_t) k_t^T    [E, M], k_t = u_t W_x2
        y_t = h_t q_t + skip * u_t                                   q_t = u_t W_x3
        out = (y * SiLU(z)) W_out

    Both directions have a convolution, W_x, W_dt, b_dt, A_log and skip each, share W_in and W_out,
    and are averaged: the block of Vim, arXiv 2401.09417, called bimamba v2 in the authors' release.
    shared_parameters=True has one of each for both.

    Source: Mamba, arXiv 2312.00752, algorithm 2 and sections 3.4 and 3.6, with the release's Euler
    step for k and its start: steps log-uniform from 0.001 to 0.1, A_log = log(1 ... M), skip 1.
    Differs for vision: the convolution may be 3x3 on the grid, and any scan order (the convolution
    stays along the raster). Both directions start so; in the release of Vim the backward one starts
    with steps near log 2, forgetting half of every token. The backbone's initialisation for the
    other projections.

    Args:
        dim, conv, direction: see TokenMixer.
        num_heads: groups of channels for several scans; nothing else.
        scans: as TokenMixer; several names divide the E channels among them.
        expand: E / C. d_state: M, at most 64. dt_rank: R; None is C / 16, rounded up.
        shared_parameters, average: of both directions; with one direction they do nothing.
        rope: not for this mixer.
    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        scans: str | Sequence[str] = "raster",
        expand: int = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        shared_parameters: bool = False,
        average: bool = True,
        rope: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, conv, direction, scans, own_conv=True, **dd)
        if rope:
            raise ValueError("pos_embed='rope2d' turns queries; Mamba has none: none or sincos2d")
        check_mamba(expand, d_state, dt_rank)
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        both = direction == "bidirectional"
        self.width = expand * dim
        self.scale = 0.5 if both and average else 1.0
        self.in_proj = nn.Linear(dim, 2 * self.width, bias=False, **dd)
        ways = ["forward", "backward"] if both and not shared_parameters else [direction]
        self.ways = nn.ModuleList(
            [SelectiveInput(self.width, d_state, dt_rank, conv, way, **dd) for way in ways]
        )
        self.out_proj = nn.Linear(self.width, dim, bias=False, **dd)

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors do not decay."""
        own: list[Any] = list(self.ways)
        return {f"ways.{i}.{name}" for i, way in enumerate(own) for name in way.no_weight_decay()}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        u_in, z = self.in_proj(x).split([self.width, self.width], dim=3)
        us: list[Tensor] = []
        deltas: list[Tensor] = []
        A_logs: list[Tensor] = []
        ks: list[Tensor] = []
        qs: list[Tensor] = []
        skips: list[Tensor] = []
        biases: list[Tensor] = []
        for way in self.ways:
            u, delta, A_log, k, q, skip, dt_bias = way(u_in)
            us.append(u)
            deltas.append(delta)
            A_logs.append(A_log)
            ks.append(k)
            qs.append(q)
            skips.append(skip)
            biases.append(dt_bias)
        y = scan_tokens(
            _together(us), _together(deltas), _together(A_logs), _together(ks), _together(qs),
            _together(skips), _together(biases), self.direction,
            token_order(x, self.scans, len(self.scans)),
        )  # fmt: skip
        y = y.reshape(z.shape) * F.silu(z)
        if self.scale != 1.0:
            y = self.scale * y
        return self.out_proj(y)


def _together(of_ways: list[Tensor]) -> Tensor:
    """One for each direction, or the one that both share."""
    return of_ways[0] if len(of_ways) == 1 else torch.stack(of_ways)
