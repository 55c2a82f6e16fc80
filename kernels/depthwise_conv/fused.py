"""The depthwise convolution's kernels as a function with gradients. Letters as in api.py."""

import torch
from torch import Tensor

from metala_vision.kernels._fused import many_or_second, portable_gradients, run, with_rows
from metala_vision.kernels.depthwise_conv.portable import portable


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    """y [B, Gh, Gw, C], contiguous."""
    from metala_vision.kernels.depthwise_conv.triton_fwd import Call, output_launch

    y, launch = output_launch(Call(with_rows(x), weight, bias, top, left))
    run([launch], y.device)
    return y


def backward(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: int,
    left: int,
    of_x: bool = True,
    of_taps: bool = True,
) -> list[Tensor | None]:
    """Gradients of x, weight and bias, each in its dtype and contiguous; None for one that is None
    or not asked for: that of x, and those of the taps."""
    from metala_vision.kernels.depthwise_conv.triton_bwd import backward_launches
    from metala_vision.kernels.depthwise_conv.triton_fwd import Call

    call = Call(with_rows(x), weight, bias, top, left)
    made, launches = backward_launches(with_rows(d_y), call, of_x, of_taps)
    run(launches, d_y.device)
    d_weight = None if made.weight is None else made.weight.sum(0).to(weight.dtype)
    d_bias = None if made.bias is None or bias is None else made.bias.sum(0).to(bias.dtype)
    return [made.x, d_weight, d_bias]


def alike(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    """The portable form where autocast made x of another dtype than the parameters."""
    bias = None if bias is None else bias.to(x.dtype)
    return portable(x, weight.to(x.dtype), bias, top, left)


class Fused(torch.autograd.Function):
    """Saves its inputs alone; the backward pass makes the convolution again."""

    @staticmethod
    def forward(ctx, x, weight, bias, top, left):
        ctx.save_for_backward(x, weight, bias)
        ctx.padding = top, left
        return forward(x, weight, bias, top, left)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[override] # torch declares (ctx, *grads)
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        if many_or_second(d_y):
            gradients = portable_gradients(
                lambda *x: [alike(*x, *ctx.padding)], [d_y], tensors, needed
            )
        else:
            gradients = backward(d_y, *tensors, *ctx.padding, needed[0], any(needed[1:3]))
        return *gradients, None, None
