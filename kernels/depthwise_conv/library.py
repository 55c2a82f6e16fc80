"""The depthwise convolution as one node of a graph compiled for a GPU. Letters as in api.py.

A compiler would call the library's convolution and write its SiLU behind it, and keep what stands
between the two for the backward pass. The node saves its inputs.
"""

import torch
from torch import Tensor

from metala_vision.kernels._fused import runs_on
from metala_vision.kernels.depthwise_conv import fused


def _takes_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" and runs_on(x.device)  # not the interpreter, which is for tests


@torch.compiler.assume_constant_result
def wanted(device: torch.device) -> bool:
    """Whether graphs on this device hold the node: where there are kernels, and on no CPU."""
    return device.type == "cuda" and runs_on(device)


@torch.library.custom_op("metala_vision::depthwise_conv_silu", mutates_args=())
def node(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    """`depthwise_conv_silu` in eager Python; [B, Gh, Gw, C], contiguous."""
    if _takes_kernels(x):
        return fused.forward(x, weight, bias, top, left)
    with torch.autocast(x.device.type, enabled=False):
        return fused.alike(x, weight, bias, top, left).contiguous()


@node.register_fake
def _(x, weight, bias, top, left):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


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
    if _takes_kernels(d_y):
        found = fused.backward(d_y, x, weight, bias, top, left, of_x, of_taps)
        return [gradient for gradient in found if gradient is not None]
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    bias = None if bias is None else bias.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(d_y.device.type, enabled=False):
        y = fused.alike(x, weight, bias, top, left)
    wanted = _asked(x, weight, bias, of_x, of_taps)
    return [gradient.contiguous() for gradient in torch.autograd.grad(y, wanted, d_y)]


def _asked(
    x: Tensor, weight: Tensor, bias: Tensor | None, of_x: bool, of_taps: bool
) -> list[Tensor]:
    """Of which there are to be gradients."""
    found = [x] if of_x else []
    if of_taps:
        found += [weight] if bias is None else [weight, bias]
    return found


# Not a custom_op: that runs its function below autograd, which is needed inside.
_library = torch.library.Library("metala_vision", "FRAGMENT")
_library.define(
    "depthwise_conv_silu_backward(Tensor d_y, Tensor x, Tensor weight, Tensor? bias, int top, "
    "int left, bool of_x, bool of_taps) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _library.impl("depthwise_conv_silu_backward", _gradients, _key)


@torch.library.register_fake("metala_vision::depthwise_conv_silu_backward", lib=_library)
def _(d_y, x, weight, bias, top, left, of_x, of_taps):
    asked = _asked(x, weight, bias, of_x, of_taps)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in asked]


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.top, ctx.left = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, d_y):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a compiled depthwise_conv_silu has no second derivatives; leave it uncompiled"
        )
    backward = torch.ops.metala_vision.depthwise_conv_silu_backward
    x, weight, bias = ctx.saved_tensors
    of_x, of_taps = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    gradients = iter(backward(d_y, x, weight, bias, ctx.top, ctx.left, of_x, of_taps))
    given = (of_x, of_taps, of_taps and bias is not None)
    return (*(next(gradients) if there else None for there in given), None, None)


node.register_autograd(_backward, setup_context=_save)
