"""The selective scan as one node of a compiled graph: the kernels on a GPU, the portable form on a
CPU. Inlined, its steps would be most of a graph. Exports inline it: they have to run without this
package.

Letters as in api.py.
"""

from typing import List  # noqa: UP035

import torch
from torch import Tensor

from metala_vision.kernels._library import (
    by_place,
    like,
    refuse_second_derivatives,
    takes_kernels,
)
from metala_vision.kernels.selective_scan import fused
from metala_vision.kernels.selective_scan.eager import Rows, portable


@torch.library.custom_op("metala_vision::selective_scan", mutates_args=())
def node(
    u: Tensor, delta: Tensor, A: Tensor, k: Tensor, q: Tensor, skip: Tensor | None,
    delta_bias: Tensor | None, direction: str, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """[D, B, N, E] in out_type(u), contiguous."""
    inputs = (u, delta, A, k, q, skip, delta_bias)
    if takes_kernels(u):
        return fused.forward(inputs, direction, order)
    return portable(*inputs, direction, order).to(fused.out_type(u)).contiguous()


@node.register_fake
def _(u, delta, A, k, q, skip, delta_bias, direction, order):
    return torch.empty(u.shape, dtype=fused.out_type(u), device=u.device)


@torch.library.custom_op("metala_vision::selective_scan_backward", mutates_args=())
def node_backward(
    d_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    skip: Tensor | None,
    delta_bias: Tensor | None,
    direction: str,
    order: Tensor | None,
) -> List[Tensor]:  # noqa: UP006  # fmt: skip  (torch 2.6 reads no other)
    """Of the seven, in their order; those that are None are left out."""
    inputs = (u, delta, A, k, q, skip, delta_bias)
    if takes_kernels(u):
        found = fused.backward(d_y, inputs, direction, order)
    else:
        found = Rows(*inputs, direction, order, d_y).gradients(inputs)
    return [x.contiguous() for x in found if x is not None]


@node_backward.register_fake
def _(d_y, u, delta, A, k, q, skip, delta_bias, direction, order):
    return like((u, delta, A, k, q, skip, delta_bias))


def _save(ctx, inputs, output) -> None:
    *given, ctx.direction, order = inputs
    ctx.save_for_backward(*given, order)


def _backward(ctx, d_y):
    refuse_second_derivatives("selective_scan")
    *inputs, order = ctx.saved_tensors
    backward = torch.ops.metala_vision.selective_scan_backward
    found = backward(d_y, *inputs, ctx.direction, order)
    return *by_place(found, (x is not None for x in inputs)), None, None


node.register_autograd(_backward, setup_context=_save)
