"""The gated norm's kernels as a function with gradients. Letters as in api.py."""

import torch
from torch import Tensor

from metala_vision.kernels._fused import many_or_second, portable_gradients, run
from metala_vision.kernels.gated_norm.portable import portable

NAMES = ("o", "output_gate", "bias", "q", "k", "gate", "v", "w_aug")  # of the tensors


def forward(*arguments) -> Tensor:
    """y [B, N, H, V], contiguous. arguments: those of `portable`."""
    from metala_vision.kernels.gated_norm.triton_fwd import Call, forward_launch

    y, launch = forward_launch(Call(*arguments))
    run([launch], y.device)
    return y


def backward(d_y: Tensor, *arguments) -> list[Tensor | None]:
    """Gradients of the tensors, each in its dtype and contiguous; None for one that is None."""
    from metala_vision.kernels.gated_norm.triton_bwd import backward_launch
    from metala_vision.kernels.gated_norm.triton_fwd import Call

    if d_y.stride(3) != 1 and d_y.shape[3] > 1:  # a sum's gradient, for one
        d_y = d_y.contiguous()
    made, launch = backward_launch(d_y, Call(*arguments))
    run([launch], d_y.device)
    gradients: list[Tensor | None] = []
    for name, x in zip(NAMES, arguments[: len(NAMES)], strict=True):
        if x is None:
            gradients.append(None)
            continue
        whole = made[name].sum(0) if name in ("bias", "w_aug") else made[name]
        gradients.append(whole.to(x.dtype))
    return gradients


class Fused(torch.autograd.Function):
    """Saves its inputs alone; the backward pass makes the rest again."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[: len(NAMES)])
        ctx.options = arguments[len(NAMES) :]
        return forward(*arguments)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[override] # torch declares (ctx, *grads)
        tensors = ctx.saved_tensors
        if many_or_second(d_y):
            gradients = portable_gradients(
                lambda *x: [portable(*x, *ctx.options)], [d_y], tensors, ctx.needs_input_grad
            )
        else:
            gradients = backward(d_y, *tensors, *ctx.options)
        return *gradients, None, None, None
