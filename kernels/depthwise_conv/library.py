"""The depthwise convolution as one node of a graph compiled for a GPU. Letters as in api.py.

A compiler would call the library's convolution and write its SiLU behind it, and keep what stands
between the two for the backward pass. The node saves its inputs.
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
from metala_vision.kernels.depthwise_conv import fused

__all__ = ["node", "wanted"]


@torch.library.custom_op("metala_vision::depthwise_conv_silu", mutates_args=())
def node(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    """`depthwise_conv_silu` in eager Python; [B, Gh, Gw, C], contiguous."""
    if takes_kernels(x):
        return fused.forward(x, weight, bias, top, left)
    with torch.autocast(x.device.type, enabled=False):
        return fused.alike(x, weight, bias, top, left).contiguous()


@node.register_fake
def _(x, weight, bias, top, left):
    return like([x])[0]


def _gradients(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: int,
    left: int,
    of_x: bool,
    of_taps: bool,
) -> list[Tensor]:
    """Gradients, of x and of weight and, if there is one, bias, as far as they are asked for."""
    if takes_kernels(d_y):
        found = fused.backward(d_y, x, weight, bias, top, left, of_x, of_taps)
        return [gradient for gradient in found if gradient is not None]
    asked = (of_x, of_taps, of_taps and bias is not None)
    return gradients(lambda *t: [fused.alike(*t, top, left)], d_y, (x, weight, bias), asked)


def _like(d_y, x, weight, bias, top, left, of_x, of_taps):
    return like([x if of_x else None, *((weight, bias) if of_taps else ())])


register_backward(
    "depthwise_conv_silu_backward(Tensor d_y, Tensor x, Tensor weight, Tensor? bias, int top, "
    "int left, bool of_x, bool of_taps) -> Tensor[]",
    _gradients,
    _like,
)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.top, ctx.left = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, d_y):
    refuse_second_derivatives("depthwise_conv_silu")
    backward = torch.ops.metala_vision.depthwise_conv_silu_backward
    x, weight, bias = ctx.saved_tensors
    of_x, of_taps = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    found = backward(d_y, x, weight, bias, ctx.top, ctx.left, of_x, of_taps)
    return *by_place(found, (of_x, of_taps, of_taps and bias is not None)), None, None


node.register_autograd(_backward, setup_context=_save)
