"""One recurrent mixer, given by its query, key, value, decay and gate functions.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T                       per head
    o_t = S_t^T q_t
    y_t = (norm(o_t) * g_t) W_O

Every gated recurrence of the package is a choice of the five (see unified_instances.py), and so is
one that you write. Source: MetaLA, arXiv 2411.10741, section 3.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width, H heads, K key width
per head, V value width per head, E channels of an output of a function.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metala_vision.kernels._checks import values_at_hand
from metala_vision.kernels.gated_linear_attention import (
    DIRECTIONS,
    MAX_KEY_WIDTH,
    MAX_VALUE_WIDTH,
    gated_linear_attention,
)

from .conv import TokenConv
from .mixer import check_option
from .scan import check_scans, inverse, token_order, visit

WAYS = {"forward": (0,), "backward": (1,), "bidirectional": (0, 1)}  # the passes of a direction
IMPLS = ("auto", "loop", "operator")
MERGES = ("sum", "each")

# (map [B, Gh, Gw, C], way) -> a number, [B, Gh, Gw, H * E], or [B, Gh, Gw, H, E] with any dimension
# 1 that is the same along it; way is 0 in the pass from the first token on, 1 from the last.
Function = Callable[[Tensor, int], Any]


class Shared(nn.Sequential):
    """Layers one after another as a function that is the same in both passes."""

    def forward(self, x: Tensor, way: int = 0) -> Tensor:
        """x [B, Gh, Gw, C] -> what the last layer gives."""
        return super().forward(x)


@dataclass(frozen=True)
class Functions:
    """What makes a mixer: callables or modules of the convolved map, see Function.

    query, key and decay have K channels a head, value V; decay is alpha itself, in (0, 1] or
    complex with such a modulus. gate has as many channels as the norm gives, or one a head, and is
    asked once, with way 0.
    """

    query: Function
    key: Function
    value: Function
    decay: Function
    gate: Function


FUNCTIONS = ("query", "key", "value", "decay", "gate")


@dataclass(frozen=True)
class Normaliser:
    """A second accumulator: z_t = alpha_t z_{t-1} + key_t, and o_t / (z_t . query_t + eps)."""

    query: Function
    key: Function
    eps: float


def check_function(name: str, function: Any) -> Function:
    """The function unchanged, or a ValueError if it cannot be called with a map and a pass."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(called).bind(None, 0)
    except TypeError as error:
        raise ValueError(
            f"{name} must be a function of a map and the pass, 0 or 1, got "
            f"{type(function).__name__}: {error}; Shared(...) makes one of layers"
        ) from error
    except ValueError:  # a built-in function without a signature
        pass
    return function


def real(o: Tensor) -> Tensor:
    """The real part of what may be complex."""
    return o.real if o.is_complex() else o


def wide(x: Tensor) -> Tensor:
    """x in float32 at least; complex and float64 ones as they are."""
    return x if x.is_complex() or x.dtype == torch.float64 else x.float()


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, reverse: bool, order: Tensor | None
) -> Tensor:
    """The definition: o [B, N, H, V] of S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

    q, k, alpha [B, N, H, K], v [B, N, H, V], each real or complex; reverse visits the tokens last
    to first; order [N], or [H, N] for each head, as gated_linear_attention's.
    """
    q, k, v, alpha = (wide(x) for x in (q, k, v, alpha))
    if order is not None:
        q, k, v, alpha = (visit(x, order) for x in (q, k, v, alpha))
    N = q.shape[1]
    S = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :])  # [B, H, K, V]
    found: dict[int, Tensor] = {}
    for t in reversed(range(N)) if reverse else range(N):
        S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        found[t] = (q[:, t, :, :, None] * S).sum(2)
    o = torch.stack([found[t] for t in range(N)], 1)
    return o if order is None else visit(o, inverse(order))


def through_operator(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, reverse: bool, order: Tensor | None
) -> Tensor:
    """The same by `gated_linear_attention`, of real tensors, K <= 128 and V <= 256.

    A decay below the least normal number counts as that.

    Raises:
        ValueError: for a decay below 0 or above 1, where values are at hand.
    """
    alpha = wide(alpha)
    if values_at_hand(alpha) and alpha.numel():
        least, most = (value.item() for value in alpha.detach().aminmax())
        if least < 0 or most > 1:
            raise ValueError(f"decay must be in [0, 1], got {least if least < 0 else most:g}; "
                             f"impl='loop' takes any")  # fmt: skip
    log_decay = alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    o = gated_linear_attention(
        q, v, k, log_decay=log_decay.contiguous(), scale=1.0, order=order,
        direction=DIRECTIONS[int(reverse)],
    )  # fmt: skip
    assert isinstance(o, Tensor)
    return o


class HeadNorm(nn.Module):
    """LayerNorm ("layer") or RMSNorm ("rms") of every head without weights, of the real part."""

    def __init__(self, kind: str = "layer", eps: float = 1e-5) -> None:
        super().__init__()
        self.kind = check_option("norm", kind, ("layer", "rms"))
        self.eps = eps

    def forward(self, o: Tensor) -> Tensor:
        """o [B, N, H, V] -> [B, N, H * V]."""
        o = real(o)
        if self.kind == "layer":
            o = o - o.mean(3, keepdim=True)
        return (o * (o.square().mean(3, keepdim=True) + self.eps).rsqrt()).flatten(2)


class UnifiedMixer(nn.Module):
    """The recurrence that five functions make, over the tokens of a map.

        x = conv(x)
        q, k, v, alpha, g = query(x), key(x), value(x), decay(x), gate(x)
        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T                   per head and pass
        o_t = S_t^T q_t, summed over the passes, + direct(x)_t
        y = (norm(o) * g) W_O + beside(x)

    Nothing is scaled: K^-0.5, where a mixer has it, is the query's. A functions' module is trained
    with the mixer. Eager, compiled and under autocast, which the decay does not see (16 bits know
    nothing between 0.996 and 1); not in scripts, which take no functions.

    Source: MetaLA, arXiv 2411.10741, equations 11 to 15 and Table 1. Differs for vision: both
    directions, each with functions of its own if these look at `way`, and any scan order.

    Args:
        functions: the five.
        dim: C. num_heads: H.
        conv: as TokenMixer's, or a module from maps to maps.
        direction, scans: as TokenMixer's; several scans divide the heads among them.
        norm: o [B, N, H, V], complex if it was so, -> [B, N, E]; None takes the real part.
        out: W_O, E to C channels; None is a Linear of C channels without bias.
        merge: "sum" of the passes, or "each": their heads side by side, [B, N, 2 H, V].
        once: with both directions, a token's own term counts once instead of in each pass; for
            functions that do not look at `way`.
        normaliser: a second accumulator that divides o.
        direct: map -> what each token adds to its own o, [B, Gh, Gw, H * V]; None is nothing.
        beside: map -> what each token adds to its own y, [B, Gh, Gw, C]; None is nothing.
        impl: "loop", the definition; "operator", gated_linear_attention, for real states of fitting
            widths; "auto", that where it is possible.
        device, dtype: of the convolution and of W_O that are made here; the functions have theirs.
    Raises:
        ValueError: naming the option, its value and what is accepted; called, for functions whose
            shapes do not fit, and for impl="operator" where that is not possible.
    """

    def __init__(
        self,
        functions: Functions,
        dim: int,
        num_heads: int,
        conv: str | nn.Module = "depthwise2d",
        direction: str = "bidirectional",
        scans: str | Sequence[str] = "raster",
        norm: Callable[[Tensor], Tensor] | None = None,
        out: nn.Module | None = None,
        merge: str = "sum",
        once: bool = False,
        normaliser: Normaliser | None = None,
        direct: Callable[[Tensor], Tensor] | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
        impl: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.direction = check_option("direction", direction, DIRECTIONS)
        self.scans = list(check_scans(scans))
        if num_heads < 1:
            raise ValueError(f"num_heads must be >= 1, got {num_heads}")
        if num_heads % len(self.scans):
            raise ValueError(
                f"num_heads={num_heads} cannot be divided among {len(self.scans)} scan orders "
                f"{tuple(self.scans)}"
            )
        self.merge = check_option("merge", merge, MERGES)
        self.impl = check_option("impl", impl, IMPLS)
        self.once = once
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = TokenConv(dim, conv, direction, **dd) if isinstance(conv, str) else conv
        self.replace(**vars(functions))
        self.query: Function
        self.key: Function
        self.value: Function
        self.decay: Function
        self.gate: Function
        self.norm, self.direct, self.beside = norm, direct, beside
        self.normaliser = normaliser
        if normaliser is not None:
            self.normaliser_query, self.normaliser_key = normaliser.query, normaliser.key
        self.out = nn.Linear(dim, dim, bias=False, **dd) if out is None else out

    @property
    def functions(self) -> Functions:
        """The five, as they stand."""
        return Functions(*(getattr(self, name) for name in FUNCTIONS))

    def replace(self, **functions: Function) -> None:
        """Others in place of those functions of the five."""
        for name, function in functions.items():
            check_function(check_option("function", name, FUNCTIONS), function)
            self._modules.pop(name, None)
            setattr(self, name, function)  # a module is registered

    def parts(self, x: Tensor, way: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k [B, N, H, K], v [B, N, H, V] and alpha [B, N, H, K] of the convolved map x."""
        return self._parts(x, way, self.query, self.key, self.value)

    def alpha(self, x: Tensor, way: int, decay: Function | None = None) -> Tensor:
        """alpha of the convolved map x, [B, N, H, K], or [B, N, H, 1] if a head has one.

        decay: asked instead of the mixer's own.
        """
        decay = self.decay if decay is None else decay
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                found = decay(wide(x), way)
        else:
            found = decay(x, way)
        shape = (x.shape[0], x.shape[1] * x.shape[2], self.num_heads)
        return self._heads("decay", found, x).expand(*shape, -1)

    def _parts(
        self, x: Tensor, way: int, query: Function, key: Function, value: Function
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (
            self._heads(name, f(x, way), x)
            for name, f in (("query", query), ("key", key), ("value", value))
        )
        alpha = self.alpha(x, way)
        shape = alpha.shape[:3]
        try:
            K = torch.broadcast_shapes(q.shape, k.shape, alpha.shape)[3]
            q, k, alpha = (part.expand(*shape, K) for part in (q, k, alpha))
            return q, k, v.expand(*shape, v.shape[3]), alpha
        except RuntimeError as error:
            raise ValueError(
                f"query, key and decay must fit [B, N, {self.num_heads} heads, K] of one K, got "
                f"{list(q.shape)}, {list(k.shape)} and {list(alpha.shape)}"
            ) from error

    def _heads(self, name: str, given: Any, x: Tensor) -> Tensor:
        """What a function gave, as [B or 1, N or 1, H or 1, E]."""
        if not isinstance(given, Tensor):
            # 0.999 is 1 in 16 bits, of which no decay must know
            dtype = wide(x[:0]).dtype if name == "decay" else x.dtype
            if isinstance(given, complex):
                dtype = wide(x[:0]).dtype.to_complex()
            return x.new_full((1, 1, 1, 1), given, dtype=dtype)
        H, shape = self.num_heads, list(given.shape)
        if given.dim() == 4 and given.shape[3] % H == 0:
            given = given.unflatten(3, (H, -1))
        whole = (*x.shape[:3], H)
        if given.dim() != 5 or any(
            n not in (1, m) for n, m in zip(given.shape, whole, strict=False)
        ):
            raise ValueError(
                f"{name} gave {shape}; accepted: a number, [B, Gh, Gw, H * E] with "
                f"B={whole[0]}, Gh={whole[1]}, Gw={whole[2]} and H={H}, or [B, Gh, Gw, H, E]"
            )
        if given.shape[1] != given.shape[2]:  # maybe the same along one side of the grid alone
            given = given.expand(given.shape[0], x.shape[1], x.shape[2], *given.shape[3:])
        return given.flatten(1, 2)

    def _gated(self, y: Tensor, gate: Any) -> Tensor:
        """y [B, Gh, Gw, E] times what the gate gave."""
        if not isinstance(gate, Tensor):
            return y * gate
        given, E = list(gate.shape), y.shape[3]
        heads = self.num_heads * (len(WAYS[self.direction]) if self.merge == "each" else 1)
        if gate.dim() == 4 and gate.shape[3] == heads != E:
            gate = gate.unsqueeze(4)
        if gate.dim() == 5 and E % heads == 0:
            y = y.unflatten(3, (heads, -1))
        if gate.dim() != y.dim() or any(
            n not in (1, m) for n, m in zip(gate.shape, y.shape, strict=True)
        ):
            raise ValueError(
                f"gate gave {given}; accepted: a number, {[*y.shape[:3], E]}, or [B, Gh, Gw, H, E] "
                f"with H={heads}"
            )
        return (y * gate).reshape(*y.shape[:3], E)

    def _passes(self, x: Tensor, query: Function, key: Function, value: Function) -> list[Tensor]:
        """o [B, N, H, V] of each pass."""
        order = token_order(x, self.scans, self.num_heads)
        found: list[Tensor] = []
        for way in WAYS[self.direction]:
            q, k, v, alpha = self._parts(x, way, query, key, value)
            fits = q.shape[3] <= MAX_KEY_WIDTH and v.shape[3] <= MAX_VALUE_WIDTH
            fits = fits and not any(part.is_complex() for part in (q, k, v, alpha))
            if self.impl == "operator" and not fits:
                raise ValueError(
                    f"impl='operator' takes real states of K <= {MAX_KEY_WIDTH} and V <= "
                    f"{MAX_VALUE_WIDTH}, got K={q.shape[3]}, V={v.shape[3]} in "
                    f"{(q * k * alpha * v[..., :1]).dtype}; impl='loop' takes any"
                )
            form = through_operator if fits and self.impl != "loop" else recurrence
            o = form(q, k, v, alpha, way == 1, order)
            if self.once and found:
                o = o - (q * k).sum(3, keepdim=True) * v
            found.append(o)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        B, Gh, Gw, _ = x.shape
        x = self.conv(x)
        passes = self._passes(x, self.query, self.key, self.value)
        o = torch.cat(passes, 2) if self.merge == "each" else sum(passes[1:], passes[0])
        if self.normaliser is not None:
            totals = self._passes(x, self.normaliser_query, self.normaliser_key, _one)
            o = o / (sum(totals[1:], totals[0]) + self.normaliser.eps)
        if self.direct is not None:
            o = o + self._heads("direct", self.direct(x), x)
        y = real(o).flatten(2) if self.norm is None else self.norm(o)
        y = self._gated(y.reshape(B, Gh, Gw, -1), self.gate(x, 0))
        if isinstance(self.out, nn.Linear) and self.out.in_features != y.shape[3]:
            raise ValueError(
                f"out takes {self.out.in_features} channels, values and norm gave {y.shape[3]}; "
                f"out=nn.Linear({y.shape[3]}, {self.out.out_features}) fits"
            )
        y = self.out(y.to(x.dtype))
        return y if self.beside is None else y + self.beside(x)


def _one(x: Tensor, way: int) -> float:
    return 1.0
