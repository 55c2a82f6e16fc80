"""The entrance to gated linear attention: validation and the choice of implementation.

B batch, N tokens, H heads, K key width per head, V value width per head.
"""

import torch
from torch import Tensor

from metala_vision.kernels._checks import (
    check_beside,
    check_order,
    check_tensor,
    values_at_hand,
)
from metala_vision.kernels._fused import implementations, in_graph, under_autocast
from metala_vision.kernels._impl import choose
from metala_vision.kernels._portable import plainly_eager
from metala_vision.kernels.gated_linear_attention import fused
from metala_vision.kernels.gated_linear_attention.chunked import chunked
from metala_vision.kernels.gated_linear_attention.library import node
from metala_vision.kernels.gated_linear_attention.reference import reference

DIRECTIONS = ("forward", "backward", "bidirectional")
MAX_KEY_WIDTH = 128
MAX_VALUE_WIDTH = 256


def gated_linear_attention(
    q: Tensor,
    v: Tensor,
    k: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    log_decay: Tensor | None = None,
    gate_divisor: float = 16.0,
    scale: float | None = None,
    direction: str = "bidirectional",
    order: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with a decaying state, over tokens in either or both directions.

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    forward visits the tokens first to last, backward last to first, bidirectional is the sum of
    both passes: a token's own term k_t v_t^T stands in each.

    Source: MetaLA, arXiv 2411.10741, equations 21 and 22 (key 1 - alpha); GLA, arXiv 2312.06635
    (key given). The papers print no scale; K^-0.5 is that of the published implementations.

    Args:
        q: queries [B, N, H, K]; float16, bfloat16, float32 or float64; K <= 128.
        v: values [B, N, H, V], q's dtype; V <= 256.
        k: keys [B, N, H, K], q's dtype. None stands for 1 - alpha and needs a decay.
        gate: raw logits [B, N, H, K], log alpha = logsigmoid(gate) / gate_divisor, computed in
            float32 (float64 for float64 q). [2, B, N, H, K] holds one gate for the forward and
            one for the backward pass. Meant for values in [-300, 80].
        log_decay: log alpha itself, natural logarithm, <= 0 (-inf forgets everything); the same
            shapes. At most one of gate and log_decay; with neither, nothing decays.
        gate_divisor: tau of MetaLA, > 0.
        scale: factor of the output; None is K^-0.5.
        direction: "forward", "backward" or "bidirectional".
        order: permutation [N], or [H, N] for one per head, int32 or int64: the token that each
            step visits. The output stays in the order of the input.
        initial_state: [B, H, K, V], float32 or float64: the state before the first token visited.
            One direction only.
        output_final_state: also return the state after the last token visited. One direction only.
        impl: "auto", "triton", "chunked" or "reference". "triton" takes float16, bfloat16 and
            float32 on a GPU, and is not for torch.compile. "auto" is "triton" where that is
            possible, compiled too, else "chunked".
    Returns:
        o [B, N, H, V] in q's dtype; with output_final_state, (o, S) with S [B, H, K, V] in float32
        (float64 for float64 q).
    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    _validate(q, v, k, gate, log_decay, gate_divisor, direction, order)
    _validate_state(q, v, direction, initial_state, output_final_state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, state = _run(
        q, v, k, gate, log_decay, float(gate_divisor), scale, direction, order, initial_state,
        output_final_state, impl,
    )  # fmt: skip
    if output_final_state:
        assert state is not None
        return o, state
    return o


def gated_linear_attention_op(
    q: Tensor,
    v: Tensor,
    k: Tensor | None,
    gate: Tensor | None,
    log_decay: Tensor | None,
    gate_divisor: float,
    scale: float,
    direction: str,
    order: Tensor | None,
) -> Tensor:
    """`gated_linear_attention` for a layer: scriptable, arguments by position, not validated.

    A script compiles the portable form in; eager Python chooses by device. The explicit `else` is
    what keeps the choice out of the script. Eager Python also leaves autocast for the operator; a
    script cannot, and loses precision (4e-3 relative) if it runs under autocast.
    """
    if torch.jit.is_scripting():
        o, _ = chunked(q, v, k, gate, log_decay, gate_divisor, scale, direction, order, None, False)
        return o
    else:
        return _run(
            q, v, k, gate, log_decay, gate_divisor, scale, direction, order, None, False, "auto"
        )[0]


def _run(
    q: Tensor,
    v: Tensor,
    k: Tensor | None,
    gate: Tensor | None,
    log_decay: Tensor | None,
    gate_divisor: float,
    scale: float,
    direction: str,
    order: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    arguments = (
        q, v, k, gate, log_decay, gate_divisor, scale, direction, order, initial_state,
        output_final_state,
    )  # fmt: skip
    if initial_state is None and not output_final_state and in_graph(q, impl):
        return node(*arguments[:9]), None
    form = choose(impl, implementations(q, impl))
    if form == "triton" and (impl == "triton" or plainly_eager(q)):
        result = fused.Fused.apply(
            q, v, k, gate, log_decay, initial_state, order, gate_divisor, scale, direction,
            output_final_state,
        )  # fmt: skip
        return result if output_final_state else (result, None)
    function = reference if form == "reference" else chunked
    if under_autocast(q):
        # Autocast would take the float32 exponents through a 16-bit product.
        with torch.autocast(q.device.type, enabled=False):
            return function(*arguments)
    return function(*arguments)


def _validate(
    q: Tensor,
    v: Tensor,
    k: Tensor | None,
    gate: Tensor | None,
    log_decay: Tensor | None,
    gate_divisor: float,
    direction: str,
    order: Tensor | None,
) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; accepted: {', '.join(DIRECTIONS)}")
    if q.dim() != 4:
        raise ValueError(f"q must be [B, N, H, K], got shape {list(q.shape)}")
    B, N, H, K = q.shape
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B={B}, N={N}, H={H}, V], got shape {list(v.shape)}")
    if min(B, N, H, K, v.shape[3]) < 1:
        raise ValueError(f"no dimension may be 0, got q {list(q.shape)} and v {list(v.shape)}")
    if K > MAX_KEY_WIDTH or v.shape[3] > MAX_VALUE_WIDTH:
        raise ValueError(
            f"K <= {MAX_KEY_WIDTH} and V <= {MAX_VALUE_WIDTH} are supported, "
            f"got K={K} and V={v.shape[3]}"
        )
    if gate is not None and log_decay is not None:
        raise ValueError("give gate or log_decay, not both")
    if k is None and gate is None and log_decay is None:
        raise ValueError("k=None stands for 1 - alpha and needs gate or log_decay; got neither")
    if not gate_divisor > 0:
        raise ValueError(f"gate_divisor must be > 0, got {gate_divisor}")
    if k is not None and k.shape != q.shape:
        raise ValueError(f"k must have q's shape {list(q.shape)}, got {list(k.shape)}")
    for name, x in (("gate", gate), ("log_decay", log_decay)):
        if x is None or x.shape == q.shape:
            continue
        if x.shape != (2, *q.shape):
            raise ValueError(
                f"{name} must be {list(q.shape)}, or {[2, *q.shape]} for one per direction, "
                f"got {list(x.shape)}"
            )
        if direction != "bidirectional":
            raise ValueError(
                f"{name} with one decay per direction needs direction='bidirectional', "
                f"got {direction!r}"
            )
    named = {"q": q, "v": v, "k": k, "gate": gate, "log_decay": log_decay}
    for name, x in named.items():
        if x is None:
            continue
        check_tensor(name, x, "q", q)
        if name in ("v", "k") and x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q has {q.dtype}; they must agree")
    if log_decay is not None and values_at_hand(log_decay) and (log_decay > 0).any():
        raise ValueError(f"log_decay must be <= 0, got {log_decay.max().item()}")
    check_order(order, N, "q", q, H)


def _validate_state(
    q: Tensor, v: Tensor, direction: str, initial_state: Tensor | None, output_final_state: bool
) -> None:
    if direction == "bidirectional" and (initial_state is not None or output_final_state):
        raise ValueError(
            "initial_state and output_final_state need direction='forward' or 'backward', "
            "got 'bidirectional'"
        )
    if initial_state is None:
        return
    B, _, H, K = q.shape
    if initial_state.shape != (B, H, K, v.shape[3]):
        raise ValueError(
            f"initial_state must be {[B, H, K, v.shape[3]]}, got {list(initial_state.shape)}"
        )
    if initial_state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"initial_state must be float32 or float64, got {initial_state.dtype}")
    check_beside("initial_state", initial_state, "q", q)
