"""Floating-point operations of a model's forward pass, counted by what is computed.

N tokens, H heads, K key width, V value width, E channels, M states, D directions.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Imported for what it registers: the operators that are counted by name.
from metala_vision.kernels._fused import whole_operators

__all__ = ["count_flops"]


def count_flops(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Of one image's forward pass; a multiplication and an addition are one each.

    Counted are products of matrices, convolutions, attention and the recurrences, whatever
    implementation computes them: for each token, head and direction

        gated linear attention  S = diag(alpha) S + k v^T, o = S^T q    5 K V (4 K V undecayed)
        selective scan          h = exp(s A) h + (s u) k^T, y = h q     6 M + 3 for each channel
        linear recurrence       h = a h + b                             2 for each value

    Not counted, as torch's FlopCounterMode does not: norms, activations, exponentials, gates and
    other elementwise work, which grows with N C where the products grow with N C^2.

    Args:
        model: on any device; on "meta" nothing is computed. Its mode is left as it was.
        input_size: channels, height, width.
    """
    ops: Any = torch.ops.metala_vision
    formulas = {
        ops.gated_linear_attention: _gated_linear_attention,
        ops.selective_scan: _selective_scan,
        ops.linear_recurrence: _linear_recurrence,
    }
    image = torch.zeros((1, *input_size), device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    training = model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)  # FlopCounterMode hooks gradients, which fails for CaiT
    try:
        # As its two products: torch has no count for the form that a CPU takes.
        with torch.no_grad(), whole_operators(), sdpa_kernel(SDPBackend.MATH), counter:
            model(image)
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_()
    return counter.get_total_flops()


# Arguments are shapes where the operator takes tensors, see FlopCounterMode.


def _directions(direction: str) -> int:
    return 2 if direction == "bidirectional" else 1


def _gated_linear_attention(
    q, v, k, gate, log_decay, gate_divisor, scale, direction, order, **_: Any
) -> int:
    B, N, H, K = q
    decayed = gate is not None or log_decay is not None
    return _directions(direction) * B * N * H * K * v[3] * (5 if decayed else 4)


def _selective_scan(
    u, delta, A, k, q, skip, delta_bias, direction, order, **_: Any
) -> int:  # fmt: skip
    D, B, N, E = u  # one of each direction
    return D * B * N * E * (6 * A[-1] + 3)


def _linear_recurrence(b, log_decay, direction, order, **_: Any) -> int:
    B, N, M, C = b[-4:]
    return _directions(direction) * B * N * M * C * 2
