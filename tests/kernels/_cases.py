"""Calls with a raw gate, and their truth: for the kernels in the interpreter and on a GPU."""

import torch

from metala_vision.kernels.gated_linear_attention.reference import reference
from tests._numerics import GATES, normal

TAU = 16.0


def inputs(N, gates="N(0,1)", *, B=1, H=1, K=32, V=16, dtype=torch.float32):
    """q, v, gate and d_o in float32, rounded to dtype first."""
    tensors = (
        normal(B, N, H, K, seed=0),
        normal(B, N, H, V, seed=1),
        GATES[gates](normal(B, N, H, K, seed=2)),
        normal(B, N, H, V, seed=3),
    )
    return [x.to(dtype).float() for x in tensors]


def truth(q, v, gate, d_o, direction):
    """The same by the recurrence and autograd, in float64."""
    given = [x.double().requires_grad_() for x in (q, v, gate)]
    scale = q.shape[3] ** -0.5
    o, _ = reference(
        given[0], given[1], None, given[2], None, TAU, scale, direction, None, None, False
    )
    gradients = torch.autograd.grad(o, given, d_o.double())
    return {"o": o.detach(), **dict(zip(("q", "v", "gate"), gradients, strict=True))}
