"""The entrance to the selective scan: validation and the choice of implementation.

B batch, N tokens, E channels, M states of a channel, D directions.
"""

import torch
from torch import Tensor

from metala_vision.kernels._checks import check_order, check_tensor, values_at_hand
from metala_vision.kernels._fused import implementations, in_graph
from metala_vision.kernels._impl import choose
from metala_vision.kernels._portable import plainly_eager
from metala_vision.kernels.selective_scan.chunked import chunked
from metala_vision.kernels.selective_scan.eager import portable
from metala_vision.kernels.selective_scan.fused import Fused
from metala_vision.kernels.selective_scan.library import node
from metala_vision.kernels.selective_scan.reference import reference

DIRECTIONS = ("forward", "backward", "bidirectional")
MAX_STATES = 64


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    skip: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    direction: str = "bidirectional",
    order: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mamba's recurrence S6, in either or both directions.

        step_t = softplus(delta_t + delta_bias)                        [E]
        h_t    = exp(step_t A) * h_{t-1} + (step_t u_t) k_t^T          [E, M], elementwise
        y_t    = h_t q_t + skip * u_t                                  [E]

    forward visits the tokens first to last, backward last to first, bidirectional gives the sum of
    both (the token's own part twice).

    Source: Mamba, arXiv 2312.00752, algorithm 2, where k, q and skip are called B, C and D; the
    step enters h by Euler's rule as in the authors' release (the paper's theorem 1 has 1 - exp).

    With direction="bidirectional" every tensor may come with a leading dimension of 2, one for each
    pass, forward first.

    Args:
        u: input [B, N, E]; float16, bfloat16, float32 or float64.
        delta: step sizes before softplus [B, N, E].
        A: rates [E, M], <= 0, M <= 64.
        k, q: what u is written by and read by [B, N, M].
        skip: [E]. delta_bias: [E].
        direction: "forward", "backward" or "bidirectional".
        order: permutation [N], int32 or int64: the token that each step visits. The result stays
            in the order of the input.
        impl: "auto", "triton", "chunked" or "reference", as for gated_linear_attention.
    Returns:
        y [B, N, E] in u's dtype.
    Raises:
        ValueError: naming the argument, its value and what is accepted.
    Compute: float32 (float64 for float64 u).
    """
    _validate(u, delta, A, k, q, skip, delta_bias, direction, order)
    D = 2 if direction == "bidirectional" else 1
    y = _run(*_by_direction(u, delta, A, k, q, skip, delta_bias, D), direction, order, impl)
    return y.sum(0).to(u.dtype)


def selective_scan_op(
    u: Tensor, delta: Tensor, A: Tensor, k: Tensor, q: Tensor, skip: Tensor | None,
    delta_bias: Tensor | None, direction: str, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """`selective_scan` for a layer: scriptable, arguments by position, not validated."""
    D = 2 if direction == "bidirectional" else 1
    u2, delta2, A2, k2, q2, skip2, bias2 = _by_direction(u, delta, A, k, q, skip, delta_bias, D)
    if torch.jit.is_scripting():
        y = chunked(u2, delta2, A2, k2, q2, skip2, bias2, direction, order)
    else:
        y = _run(u2, delta2, A2, k2, q2, skip2, bias2, direction, order, "auto")
    return y.sum(0).to(u.dtype)


def _expanded(x: Tensor, dims: int, D: int) -> Tensor:
    """x with a leading dimension of D directions; without one yet, it has `dims` dimensions."""
    if x.dim() > dims:
        return x
    return x.unsqueeze(0).expand([D] + list(x.shape))  # noqa: RUF005 # a script


def _by_direction(
    u: Tensor, delta: Tensor, A: Tensor, k: Tensor, q: Tensor, skip: Tensor | None,
    delta_bias: Tensor | None, D: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    return (
        _expanded(u, 3, D), _expanded(delta, 3, D), _expanded(A, 2, D), _expanded(k, 3, D),
        _expanded(q, 3, D), None if skip is None else _expanded(skip, 1, D),
        None if delta_bias is None else _expanded(delta_bias, 1, D),
    )  # fmt: skip


def _run(
    u: Tensor, delta: Tensor, A: Tensor, k: Tensor, q: Tensor, skip: Tensor | None,
    delta_bias: Tensor | None, direction: str, order: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    """[D, B, N, E]."""
    call = (u, delta, A, k, q, skip, delta_bias, direction, order)
    if in_graph(u, impl):
        return node(*call)
    form = choose(impl, implementations(u, impl))
    if form == "triton" and (impl == "triton" or plainly_eager(u)):
        return Fused.apply(*call)
    return (reference if form == "reference" else portable)(*call)


def _validate(
    u: Tensor, delta: Tensor, A: Tensor, k: Tensor, q: Tensor, skip: Tensor | None,
    delta_bias: Tensor | None, direction: str, order: Tensor | None,
) -> None:  # fmt: skip
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; accepted: {', '.join(DIRECTIONS)}")
    if u.dim() not in (3, 4) or min(u.shape) < 1:
        raise ValueError(
            "u must be [B, N, E], or [2, B, N, E] for one per direction, no dimension 0, "
            f"got shape {list(u.shape)}"
        )
    B, N, E = u.shape[-3:]
    M = A.shape[-1] if A.dim() else 0
    if not 1 <= M <= MAX_STATES:
        raise ValueError(f"A must be [E, M] with M from 1 to {MAX_STATES}, got {list(A.shape)}")
    shapes = {
        "u": (u, [B, N, E]), "delta": (delta, [B, N, E]), "A": (A, [E, M]), "k": (k, [B, N, M]),
        "q": (q, [B, N, M]), "skip": (skip, [E]), "delta_bias": (delta_bias, [E]),
    }  # fmt: skip
    for name, (x, shape) in shapes.items():
        if x is None:
            continue
        if list(x.shape) not in (shape, [2, *shape]):
            raise ValueError(
                f"{name} must have shape {shape} or {[2, *shape]}, got {list(x.shape)}"
            )
        if x.dim() > len(shape) and direction != "bidirectional":
            raise ValueError(
                f"{name} with one for each direction needs direction='bidirectional', "
                f"got {direction!r}"
            )
        check_tensor(name, x, "u", u)
    if values_at_hand(A) and (A > 0).any():
        raise ValueError(f"A must be <= 0, got {A.max().item()}")
    check_order(order, N, "u", u)
