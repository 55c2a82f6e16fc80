"""Scan orders: in which sequence a recurrence visits the tokens of a grid.

Gh x Gw the token grid, N = Gh * Gw, H heads, r row, c column. Tokens are numbered in raster order,
r Gw + c. An order is a permutation [N]: step t visits token order[t].
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from metala_vision.kernels._portable import may_keep

ORDERS = ("raster", "column", "snake", "diagonal", "hilbert", "morton", "spiral", "window(SIZE)")
# Built from ranges alone: the size of the grid may stay unknown while a model is exported.
ANY_SIZE = ("raster", "column", "snake")


def check_scans(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, or a ValueError with the accepted ones. One name may stand alone."""
    scans = (names,) if isinstance(names, str) else tuple(names)
    accepted = f"accepted: {', '.join(ORDERS)}"
    if not scans:
        raise ValueError(f"scans={names!r} names no order; {accepted}")
    for name in scans:
        if name not in ORDERS[:-1] and not re.fullmatch(r"window\([1-9]\d*\)", str(name)):
            raise ValueError(f"scan order {name!r} is unknown; {accepted}")
    return scans


def scan_order(name: str, Gh: int, Gw: int, device: torch.device | str | None = None) -> Tensor:
    """The order of that name on a grid of any size, int64 [N].

        raster    row by row, left to right
        column    column by column, top to bottom
        snake     row by row, every second one right to left: each step goes to a neighbour
        diagonal  by r + c, then by r
        hilbert   Hilbert's curve generalised to rectangles: neighbours where both sides are even,
                  else with at most one diagonal step
        morton    by the interleaved bits of r and c
        spiral    clockwise from the top left corner inwards: each step goes to a neighbour
        window(s) raster inside windows of s x s, the windows in raster order, cut at the edges

    Raises:
        ValueError: for another name or an empty grid.
    """
    check_scans(name)
    if Gh < 1 or Gw < 1:
        raise ValueError(f"a grid needs at least one row and one column, got {Gh}x{Gw}")
    return _build(name, Gh, Gw, torch.device("cpu" if device is None else device))


def inverse(order: Tensor) -> Tensor:
    """When each token is visited: inverse(order)[order[t]] = t, along the last dimension."""
    return torch.argsort(order, dim=-1)


def visit(x: Tensor, order: Tensor) -> Tensor:
    """x [B, N, H, E] with its tokens in `order` [N] or [H, N]."""
    if order.dim() == 1:
        return x.index_select(1, order)
    return x.gather(1, order.t().unsqueeze(2).expand(x.shape))


@register_notrace_function
def token_order(x: Tensor, names: list[str], num_heads: int) -> Tensor | None:
    """The order for a map x [B, Gh, Gw, C]: None for raster, [N], or [H, N] for several names.

    Several names divide the heads among them, in that sequence.
    """
    if len(names) == 1 and names[0] == "raster":
        return None
    Gh, Gw = x.shape[1], x.shape[2]
    if torch.jit.is_scripting():
        orders = [_build(name, Gh, Gw, x.device) for name in names]
    else:
        orders = [_for_grid(name, Gh, Gw, x) for name in names]
    if len(names) == 1:
        return orders[0]
    return torch.stack(orders).repeat_interleave(num_heads // len(names), dim=0)


def _for_grid(name: str, Gh: int, Gw: int, x: Tensor) -> Tensor:
    """Eager: kept from call to call. Traced: built in the graph where the grid is symbolic."""
    device = x.device
    if isinstance(Gh, int) and isinstance(Gw, int):
        if may_keep(x):
            return _cached(name, Gh, Gw, device)
        return _build(name, Gh, Gw, device)
    if name not in ANY_SIZE:
        raise ValueError(
            f"scan order {name!r} needs an image size that is fixed at export; "
            f"with a dynamic one: {', '.join(ANY_SIZE)}"
        )
    return _build(name, Gh, Gw, device)


@lru_cache(maxsize=128)
def _cached(name: str, Gh: int, Gw: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        return _build(name, Gh, Gw, device)


def _build(name: str, Gh: int, Gw: int, device: torch.device) -> Tensor:
    if name == "hilbert":
        return torch.tensor(_hilbert(Gh, Gw), device=device)
    r = torch.arange(Gh, device=device).unsqueeze(1)
    c = torch.arange(Gw, device=device).unsqueeze(0)
    if name == "raster":
        return (r * Gw + c).flatten()
    if name == "column":
        return (r * Gw + c).t().flatten()
    if name == "snake":
        return (r * Gw + torch.where(r % 2 == 1, Gw - 1 - c, c)).flatten()
    if name == "diagonal":
        key = (r + c) * Gh + r
    elif name == "morton":
        key = _spread_bits(r) * 2 + _spread_bits(c)
    elif name == "spiral":
        key = _spiral_key(r, c, Gh, Gw)
    else:
        s = int(name[7:-1])
        window = (r // s) * Gw + c // s
        key = (window * s + r % s) * s + c % s
    return torch.argsort(key.expand(Gh, Gw).flatten())


def _spread_bits(x: Tensor) -> Tensor:
    """x with a zero between any two of its bits; x < 2^16."""
    x = (x | (x << 8)) & 0x00FF00FF
    x = (x | (x << 4)) & 0x0F0F0F0F
    x = (x | (x << 2)) & 0x33333333
    return (x | (x << 1)) & 0x55555555


def _spiral_key(r: Tensor, c: Tensor, Gh: int, Gw: int) -> Tensor:
    """How many tokens lie in the rings further out, plus the way along the token's own ring."""
    ring = torch.minimum(torch.minimum(r, c), torch.minimum(Gh - 1 - r, Gw - 1 - c))
    h, w = Gh - 2 * ring, Gw - 2 * ring
    down, right = r - ring, c - ring
    # The sides overlap at corners and, where a ring is a single line, everywhere: first come first.
    way = 2 * (w - 1) + (h - 1) + (h - 1 - down)
    way = torch.where(down == h - 1, (w - 1) + (h - 1) + (w - 1 - right), way)
    way = torch.where(right == w - 1, w - 1 + down, way)
    way = torch.where(down == 0, right, way)
    return Gh * Gw - h * w + way


def _hilbert(Gh: int, Gw: int) -> list[int]:
    """Tokens along a curve between two corners of the longer side, without recursion: scriptable.

    An item is a rectangle of w tokens along a unit vector u and h along v, to be crossed from its
    corner (x, y) to the far end of u. A long one is halved. Another is crossed by three curves: up
    the first half of u, along the rest of v, down the second half. Halves are even where they can
    be, so that the parts meet at neighbours.
    """
    visited: list[int] = []
    wide = int(Gw >= Gh)
    todo = [[max(Gh, Gw), min(Gh, Gw), 0, 0, wide, 1 - wide, 1 - wide, wide]]
    while len(todo) > 0:
        w, h, x, y, ux, uy, vx, vy = todo.pop()
        if w == 1 or h == 1:
            dx, dy = (ux, uy) if h == 1 else (vx, vy)
            for i in range(w * h):
                visited.append((y + i * dy) * Gw + x + i * dx)
        elif 2 * w > 3 * h:
            a = w // 2
            if w > 2:
                a += a % 2
            todo.append([w - a, h, x + a * ux, y + a * uy, ux, uy, vx, vy])
            todo.append([a, h, x, y, ux, uy, vx, vy])
        else:
            a, b = w // 2, h // 2
            if h > 2:
                b += b % 2
            end_x, end_y = x + (w - 1) * ux + (b - 1) * vx, y + (w - 1) * uy + (b - 1) * vy
            todo.append([b, w - a, end_x, end_y, -vx, -vy, -ux, -uy])
            todo.append([w, h - b, x + b * vx, y + b * vy, ux, uy, vx, vy])
            todo.append([b, a, x, y, vx, vy, ux, uy])
    return visited
