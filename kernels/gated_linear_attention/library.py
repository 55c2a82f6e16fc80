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

from metala_vision.kernels._fused import runs_on, why_not
from metala_vision.kernels.gated_linear_attention import fused
from metala_vision.kernels.gated_linear_attention.chunked import chunked


def _takes_kernels(q: Tensor) -> bool:
    if q.device.type == "cpu":  # the interpreter is for tests, and asked for by name
        return False
    return runs_on(q.device) and not why_not(q)


@torch.library.custom_op("metala_vision::gated_linear_attention", mutates_args=())
def portable(
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
    if _takes_kernels(q):
        return fused.forward(
            q, v, k, gate, log_decay, gate_divisor, scale, direction, order, None, False
        )[0]
    with torch.autocast(q.device.type, enabled=False):
        o, _ = chunked(q, v, k, gate, log_decay, gate_divisor, scale, direction, order, None, False)
    return o.contiguous()


@portable.register_fake
def _(q, v, k, gate, log_decay, gate_divisor, scale, direction, order):
    return torch.empty(v.shape, dtype=q.dtype, device=q.device)


def _gradients(d_o: Tensor, *arguments) -> list[Tensor]:
    """Gradients of those of q, v, k, gate and log_decay that are given, in that order.

    arguments: those of `portable`, five tensors first.
    """
    if _takes_kernels(arguments[0]):
        made = fused.backward(d_o, None, *arguments, None)
        return [x for x in made if x is not None]
    given = [None if x is None else x.detach().requires_grad_() for x in arguments[:5]]
    with torch.enable_grad(), torch.autocast(d_o.device.type, enabled=False):
        o, _ = chunked(*given, *arguments[5:], None, False)
        gradients = torch.autograd.grad(o, [x for x in given if x is not None], d_o)
    return [gradient.contiguous() for gradient in gradients]


# Not a custom_op: that runs its function below autograd, which is needed inside.
_library = torch.library.Library("metala_vision", "FRAGMENT")
_library.define(
    "gated_linear_attention_backward(Tensor d_o, Tensor q, Tensor v, Tensor? k, Tensor? gate, "
    "Tensor? log_decay, float gate_divisor, float scale, str direction, Tensor? order) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _library.impl("gated_linear_attention_backward", _gradients, _key)


@torch.library.register_fake("metala_vision::gated_linear_attention_backward", lib=_library)
def _(d_o, *arguments):
    given = (x for x in arguments[:5] if x is not None)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.gate_divisor, ctx.scale, ctx.direction, order = inputs
    ctx.given = [x is not None for x in tensors]
    ctx.save_for_backward(*tensors, order)


def _backward(ctx, d_o):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a compiled gated_linear_attention has no second derivatives; leave it uncompiled"
        )
    *tensors, order = ctx.saved_tensors
    backward = torch.ops.metala_vision.gated_linear_attention_backward
    gradients = iter(backward(d_o, *tensors, ctx.gate_divisor, ctx.scale, ctx.direction, order))
    return (*(next(gradients) if given else None for given in ctx.given), None, None, None, None)


portable.register_autograd(_backward, setup_context=_save)
