"""The gated norm's kernels as a function with gradients. Letters as in api.py."""

import torch

from metala_vision.kernels._fused import many_or_second, portable_gradients, run
from metala_vision.kernels.gated_norm.portable import portable


class Fused(torch.autograd.Function):
    """Saves its inputs alone; the backward pass makes the rest again."""

    @staticmethod
    def forward(ctx, o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps):
        from metala_vision.kernels.gated_norm.triton_fwd import Call, forward_launch

        tensors = (o, output_gate, bias, q, k, gate, v, w_aug)
        ctx.save_for_backward(*tensors)
        ctx.options = (gate_divisor, norm, eps)
        y, launch = forward_launch(Call(*tensors, *ctx.options))
        run([launch], o.device)
        return y

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[override] # torch declares (ctx, *grads)
        from metala_vision.kernels.gated_norm.triton_bwd import backward_launch
        from metala_vision.kernels.gated_norm.triton_fwd import Call

        tensors = ctx.saved_tensors
        if many_or_second(d_y):
            gradients = portable_gradients(
                lambda *x: [portable(*x, *ctx.options)], [d_y], tensors, ctx.needs_input_grad
            )
            return *gradients, None, None, None
        if d_y.stride(3) != 1 and d_y.shape[3] > 1:  # a sum's gradient, for one
            d_y = d_y.contiguous()
        made, launch = backward_launch(d_y, Call(*tensors, *ctx.options))
        run([launch], d_y.device)
        names = ("o", "output_gate", "bias", "q", "k", "gate", "v", "w_aug")
        gradients = []
        for name, x in zip(names, tensors, strict=True):
            if x is None:
                gradients.append(None)
                continue
            whole = made[name].sum(0) if name in ("bias", "w_aug") else made[name]
            gradients.append(whole.to(x.dtype))
        return *gradients, None, None, None
