"""The gated norm as one node of a graph that is compiled for a GPU. Letters as in api.py.

A compiler would fuse the portable form as well, but save for the backward pass what it makes on the
way in float32: queries, keys, decays and values once more, a fifth of what a training step of
metala_tiny holds. The node saves its inputs, which the operator before it saves too.
"""

import torch
from torch import Tensor

from metala_vision.kernels._library import (
    by_place,
    gradients,
    like,
    refuse_second_derivatives,
    register_backward,
    takes_kernels,
    wanted,
)
from metala_vision.kernels.gated_norm import fused
from metala_vision.kernels.gated_norm.portable import portable

__all__ = ["node", "wanted"]
TENSORS = len(fused.NAMES)  # of a call, in front of its options


@torch.library.custom_op("metala_vision::gated_norm", mutates_args=())
def node(
    o: Tensor,
    output_gate: Tensor,
    bias: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    gate: Tensor | None,
    v: Tensor | None,
    w_aug: Tensor | None,
    gate_divisor: float,
    norm: str,
    eps: float,
) -> Tensor:
    """`gated_norm` in eager Python; [B, N, H, V], contiguous."""
    arguments = (o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps)
    if takes_kernels(o):
        return fused.forward(*arguments)
    with torch.autocast(o.device.type, enabled=False):
        return portable(*arguments).contiguous()


@node.register_fake
def _(o, *arguments):
    return like([o])[0]


def _gradients(d_y: Tensor, *arguments) -> list[Tensor]:
    """Gradients of those of the tensors that are given. arguments: those of `node`."""
    if takes_kernels(d_y):
        return [x for x in fused.backward(d_y, *arguments) if x is not None]
    options = arguments[TENSORS:]
    return gradients(lambda *t: [portable(*t, *options)], d_y, arguments[:TENSORS])


register_backward(
    "gated_norm_backward(Tensor d_y, Tensor o, Tensor output_gate, Tensor? bias, Tensor? q, "
    "Tensor? k, Tensor? gate, Tensor? v, Tensor? w_aug, float gate_divisor, str norm, float eps) "
    "-> Tensor[]",
    _gradients,
    lambda d_y, *arguments: like(arguments[:TENSORS]),
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.gate_divisor, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_y):
    refuse_second_derivatives("gated_norm")
    tensors = ctx.saved_tensors
    backward = torch.ops.metala_vision.gated_norm_backward
    found = backward(d_y, *tensors, ctx.gate_divisor, ctx.norm, ctx.eps)
    return *by_place(found, (x is not None for x in tensors)), None, None, None


node.register_autograd(_backward, setup_context=_save)
