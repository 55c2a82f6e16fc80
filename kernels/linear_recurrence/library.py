"""The linear recurrence as one node of a compiled graph: the kernels on a GPU, the portable form on
a CPU. Inlined, its doubling steps would be most of a graph. Exports inline it: they have to run
without this package.

Letters as in api.py.
"""

import torch
from torch import Tensor

from metala_vision.kernels._library import (
    gradients,
    like,
    refuse_second_derivatives,
    register_backward,
    takes_kernels,
)
from metala_vision.kernels.linear_recurrence import fused


@torch.library.custom_op("metala_vision::linear_recurrence", mutates_args=())
def node(b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None) -> Tensor:
    """[D, B, N, M, C], contiguous."""
    if takes_kernels(b):
        return fused.forward(b, log_decay, direction, order)
    return fused.alike(b, log_decay, direction, order).contiguous()


@node.register_fake
def _(b, log_decay, direction, order):
    directions = 2 if direction == "bidirectional" else 1
    return torch.empty((directions, *b.shape[-4:]), dtype=b.dtype, device=b.device)


def _gradients(d_h, h, b, log_decay, direction, order) -> list[Tensor]:
    """Of b and log_decay."""
    if takes_kernels(b):
        return list(fused.backward(d_h, h, log_decay, direction, order, b.dim() == 4))
    return gradients(lambda *t: [fused.alike(*t, direction, order)], d_h, (b, log_decay))


register_backward(
    "linear_recurrence_backward(Tensor d_h, Tensor h, Tensor b, Tensor log_decay, str direction, "
    "Tensor? order) -> Tensor[]",
    _gradients,
    lambda d_h, h, b, log_decay, direction, order: like([b, log_decay]),
)


def _save(ctx, inputs, output) -> None:
    b, log_decay, ctx.direction, order = inputs
    ctx.save_for_backward(output, b, log_decay, order)


def _backward(ctx, d_h):
    refuse_second_derivatives("linear_recurrence")
    h, b, log_decay, order = ctx.saved_tensors
    backward = torch.ops.metala_vision.linear_recurrence_backward
    return *backward(d_h, h, b, log_decay, ctx.direction, order), None, None


node.register_autograd(_backward, setup_context=_save)
