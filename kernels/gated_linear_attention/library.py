"""The operator as one node of a compiled graph: the kernels on a GPU, the portable form on a CPU.

torch.compile cannot look at values, so inlined code would take the slower way through every chunk,
and a model of twelve layers would take many minutes to compile. As one registered operator the
graph runs what eager Python runs. Its backward pass recomputes the forward one: a graph saves the
inputs alone. Calls with carried states are inlined, and so are exports, which have to run without
this package.

Letters as in api.py.
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
)
from metala_vision.kernels.gated_linear_attention import fused
from metala_vision.kernels.gated_linear_attention.chunked import chunked


@torch.library.custom_op("metala_vision::gated_linear_attention", mutates_args=())
def node(
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
    """`gated_linear_attention` in eager Python; [B, N, H, V], contiguous."""
    if takes_kernels(q):
        return fused.forward(
            q, v, k, gate, log_decay, gate_divisor, scale, direction, order, None, False
        )[0]
    with torch.autocast(q.device.type, enabled=False):
        o, _ = chunked(q, v, k, gate, log_decay, gate_divisor, scale, direction, order, None, False)
    return o.contiguous()


@node.register_fake
def _(q, v, k, gate, log_decay, gate_divisor, scale, direction, order):
    return torch.empty(v.shape, dtype=q.dtype, device=q.device)


def _gradients(d_o: Tensor, *arguments) -> list[Tensor]:
    """Gradients of those of q, v, k, gate and log_decay that are given, in that order.

    arguments: those of `node`, five tensors first.
    """
    tensors, options = arguments[:5], arguments[5:]
    if takes_kernels(tensors[0]):
        made = fused.backward(d_o, None, *arguments, None)
        return [x for x in made if x is not None]
    return gradients(lambda *t: chunked(*t, *options, None, False)[:1], d_o, tensors)


register_backward(
    "gated_linear_attention_backward(Tensor d_o, Tensor q, Tensor v, Tensor? k, Tensor? gate, "
    "Tensor? log_decay, float gate_divisor, float scale, str direction, Tensor? order) -> Tensor[]",
    _gradients,
    lambda d_o, *arguments: like(arguments[:5]),
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.gate_divisor, ctx.scale, ctx.direction, order = inputs
    ctx.save_for_backward(*tensors, order)


def _backward(ctx, d_o):
    refuse_second_derivatives("gated_linear_attention")
    *tensors, order = ctx.saved_tensors
    backward = torch.ops.metala_vision.gated_linear_attention_backward
    found = backward(d_o, *tensors, ctx.gate_divisor, ctx.scale, ctx.direction, order)
    given = (x is not None for x in tensors)
    return *by_place(found, given), None, None, None, None


node.register_autograd(_backward, setup_context=_save)
