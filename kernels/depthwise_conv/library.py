"""The depthwise convolution as one node of a graph compiled for a GPU. Letters as in api.py.

A compiler would call the library's convolution and write its SiLU behind it, and keep what stands
between the two for the backward pass. The node saves its inputs.
"""

import torch
from torch import Tensor

from metala_vision.kernels._fused import runs_on
from metala_vision.kernels.depthwise_conv import fused
from metala_vision.kernels.depthwise_conv.portable import portable


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
    return _plain(x, weight, bias, top, left).contiguous()


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(x.dtype)
        return portable(x, weight.to(x.dtype), bias, top, left)


@node.register_fake
def _(x, weight, bias, top, left):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gradients(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int
) -> list[Tensor]:
    """Gradients of x, weight and, if there is one, bias."""
    if _takes_kernels(d_y):
        found = fused.backward(d_y, x, weight, bias, top, left)
        return [gradient for gradient in found if gradient is not None]
    given = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        y = _plain(*given, top, left)  # type: ignore[arg-type] # x and weight are given
    gradients = torch.autograd.grad(y, [t for t in given if t is not None], d_y)
    return [gradient.contiguous() for gradient in gradients]


# Not a custom_op: that runs its function below autograd, which is needed inside.
_library = torch.library.Library("metala_vision", "FRAGMENT")
_library.define(
    "depthwise_conv_silu_backward(Tensor d_y, Tensor x, Tensor weight, Tensor? bias, int top, "
    "int left) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _library.impl("depthwise_conv_silu_backward", _gradients, _key)


@torch.library.register_fake("metala_vision::depthwise_conv_silu_backward", lib=_library)
def _(d_y, x, weight, bias, top, left):
    given = (t for t in (x, weight, bias) if t is not None)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given]


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
    gradients = backward(d_y, x, weight, bias, ctx.top, ctx.left)
    return (*gradients, *([] if bias is not None else [None]), None, None)


node.register_autograd(_backward, setup_context=_save)
