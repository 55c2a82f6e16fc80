"""The depthwise convolution's kernels as a function with gradients. Letters as in api.py."""

import torch
from torch import Tensor

from metala_vision.kernels._fused import many_or_second, portable_gradients, run, with_rows
from metala_vision.kernels.depthwise_conv.portable import portable


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> Tensor:
    """y [B, Gh, Gw, C], contiguous."""
    from metala_vision.kernels.depthwise_conv.triton_fwd import Call, forward_launch

    y, launch = forward_launch(Call(with_rows(x), weight, bias, top, left))
    run([launch], y.device)
    return y


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int
) -> list[Tensor | None]:
    """Gradients of x, weight and bias, each in its dtype and contiguous; None for one that is
    None."""
    from metala_vision.kernels.depthwise_conv.triton_bwd import backward_launches
    from metala_vision.kernels.depthwise_conv.triton_fwd import Call

    made, launches = backward_launches(with_rows(d_y), Call(with_rows(x), weight, bias, top, left))
    run(launches, d_y.device)
    d_weight = made.weight.sum(0).t().reshape(weight.shape).to(weight.dtype)
    if bias is None or made.bias is None:
        return [made.x, d_weight, None]
    return [made.x, d_weight, made.bias.sum(0).to(bias.dtype)]


class Fused(torch.autograd.Function):
    """Saves its inputs alone; the backward pass makes the convolution again."""

    @staticmethod
    def forward(ctx, x, weight, bias, top, left):
        ctx.save_for_backward(x, weight, bias)
        ctx.padding = top, left
        return forward(x, weight, bias, top, left)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[override] # torch declares (ctx, *grads)
        tensors = ctx.saved_tensors
        if many_or_second(d_y):
            gradients = portable_gradients(
                lambda *x: [portable(*x, *ctx.padding)], [d_y], tensors, ctx.needs_input_grad
            )
        else:
            gradients = backward(d_y, *tensors, *ctx.padding)
        return *gradients, None, None
