"""The entrance to the linear recurrence: validation and the choice of implementation.

B batch, N tokens, C channels of decay, M values that share one, D directions.
"""

import torch
from torch import Tensor

from metala_vision.kernels._checks import check_order, check_tensor, values_at_hand
from metala_vision.kernels._fused import implementations, in_graph
from metala_vision.kernels._impl import choose
from metala_vision.kernels._portable import plainly_eager
from metala_vision.kernels.linear_recurrence.chunked import chunked
from metala_vision.kernels.linear_recurrence.fused import Fused
from metala_vision.kernels.linear_recurrence.library import node
from metala_vision.kernels.linear_recurrence.reference import reference

DIRECTIONS = ("forward", "backward", "bidirectional")


def linear_recurrence(
    b: Tensor,
    log_decay: Tensor,
    *,
    direction: str = "bidirectional",
    order: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """A decaying sum over tokens, channel by channel, in either or both directions.

        h_t = exp(log_decay_t) h_{t-1} + b_t

    forward visits the tokens first to last, backward last to first, bidirectional gives both
    states, which are not summed.

    Source: the elementwise recurrences of HGRN, arXiv 2311.04823, and LRU, arXiv 2303.06349. A
    constant rotation of complex states is a rotation of b before and of h behind.

    Args:
        b: what each token adds [B, N, M, C], float16, bfloat16, float32 or float64; M values share
            a decay (real and imaginary part, for instance). [2, B, N, M, C] is one for each pass.
        log_decay: natural logarithm of the decay [B, N, C], <= 0.
        direction: "forward", "backward" or "bidirectional".
        order: permutation [N], int32 or int64: the token that each step visits. The result stays
            in the order of the input.
        impl: "auto", "triton", "chunked" or "reference", as for gated_linear_attention.
    Returns:
        h in b's dtype: [B, N, M, C], or for both directions [2, B, N, M, C], forward first.
    Raises:
        ValueError: naming the argument, its value and what is accepted.
    Compute: float32 (float64 for float64 b).
    """
    _validate(b, log_decay, direction, order)
    return _run(b, log_decay, direction, order, impl)


def linear_recurrence_op(
    b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None
) -> Tensor:
    """`linear_recurrence` for a layer: scriptable, arguments by position, not validated."""
    if torch.jit.is_scripting():
        return chunked(b, log_decay, direction, order)
    else:
        return _run(b, log_decay, direction, order, "auto")


def _run(b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None, impl: str) -> Tensor:
    both = direction == "bidirectional"
    if in_graph(b, impl):
        h = node(b, log_decay, direction, order)
        return h if both else h[0]
    form = choose(impl, implementations(b, impl))
    if form == "triton" and (impl == "triton" or plainly_eager(b)):
        h = Fused.apply(b, log_decay, direction, order)
        return h if both else h[0]
    return (reference if form == "reference" else chunked)(b, log_decay, direction, order)


def _validate(b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; accepted: {', '.join(DIRECTIONS)}")
    if b.dim() not in (4, 5) or (b.dim() == 5 and b.shape[0] != 2) or min(b.shape) < 1:
        raise ValueError(
            "b must be [B, N, M, C], or [2, B, N, M, C] for one per direction, no dimension 0, "
            f"got shape {list(b.shape)}"
        )
    if b.dim() == 5 and direction != "bidirectional":
        raise ValueError(
            f"b with one for each direction needs direction='bidirectional', got {direction!r}"
        )
    B, N, _, C = b.shape[-4:]
    if list(log_decay.shape) != [B, N, C]:
        raise ValueError(f"log_decay must have shape {[B, N, C]}, got {list(log_decay.shape)}")
    for name, x in (("b", b), ("log_decay", log_decay)):
        check_tensor(name, x, "b", b)
    if values_at_hand(log_decay) and (log_decay > 0).any():
        raise ValueError(f"log_decay must be <= 0, got {log_decay.max().item()}")
    check_order(order, N, "b", b)
