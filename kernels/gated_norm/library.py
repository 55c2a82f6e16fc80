"""The gated norm as one node of a graph that is compiled for a GPU. Letters as in api.py.

A compiler would fuse the portable form as well, but save for the backward pass what it makes on the
way in float32: queries, keys, decays and values once more, a fifth of what a training step of
metala_tiny holds. The node saves its inputs, which the operator before it saves too.
"""

import torch
from torch import Tensor

from metala_vision.kernels._fused import runs_on
from metala_vision.kernels.gated_norm import fused
from metala_vision.kernels.gated_norm.portable import portable


def _takes_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" and runs_on(x.device)  # not the interpreter, which is for tests


@torch.compiler.assume_constant_result
def wanted(device: torch.device) -> bool:
    """Whether graphs on this device hold the node: where there are kernels, and on no CPU."""
    return device.type == "cuda" and runs_on(device)


@torch.library.custom_op("metala_vision::gated_norm", mutates_args=())
def node(
    o: Tensor,
    output_gate: Tensor,
    bias: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    gate: Tensor | None,
    v: Tensor | None,
    w_aug: Tensor | None,
    gate_divisor: float,
    norm: str,
    eps: float,
) -> Tensor:
    """`gated_norm` in eager Python; [B, N, H, V], contiguous."""
    arguments = (o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps)
    if _takes_kernels(o):
        return fused.forward(*arguments)
    with torch.autocast(o.device.type, enabled=False):
        return portable(*arguments).contiguous()


@node.register_fake
def _(o, *arguments):
    return torch.empty(o.shape, dtype=o.dtype, device=o.device)


def _gradients(d_y: Tensor, *arguments) -> list[Tensor]:
    """Gradients of those of the tensors that are given. arguments: those of `node`."""
    tensors, options = arguments[:8], arguments[8:]
    if _takes_kernels(d_y):
        return [x for x in fused.backward(d_y, *arguments) if x is not None]
    given = [None if x is None else x.detach().requires_grad_() for x in tensors]
    with torch.enable_grad(), torch.autocast(d_y.device.type, enabled=False):
        y = portable(*given, *options)
        gradients = torch.autograd.grad(y, [x for x in given if x is not None], d_y)
    return [gradient.contiguous() for gradient in gradients]


# Not a custom_op: that runs its function below autograd, which is needed inside.
_library = torch.library.Library("metala_vision", "FRAGMENT")
_library.define(
    "gated_norm_backward(Tensor d_y, Tensor o, Tensor output_gate, Tensor? bias, Tensor? q, "
    "Tensor? k, Tensor? gate, Tensor? v, Tensor? w_aug, float gate_divisor, str norm, float eps) "
    "-> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _library.impl("gated_norm_backward", _gradients, _key)


@torch.library.register_fake("metala_vision::gated_norm_backward", lib=_library)
def _(d_y, *arguments):
    given = (x for x in arguments[:8] if x is not None)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.gate_divisor, ctx.norm, ctx.eps = inputs
    ctx.given = [x is not None for x in tensors]
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_y):
    if torch.is_grad_enabled():
        raise RuntimeError("a compiled gated_norm has no second derivatives; leave it uncompiled")
    backward = torch.ops.metala_vision.gated_norm_backward
    gradients = iter(backward(d_y, *ctx.saved_tensors, ctx.gate_divisor, ctx.norm, ctx.eps))
    return (*(next(gradients) if given else None for given in ctx.given), None, None, None)


node.register_autograd(_backward, setup_context=_save)
