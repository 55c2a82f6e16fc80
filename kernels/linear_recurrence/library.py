"""The linear recurrence as one node of a compiled graph: the kernels on a GPU, the portable form on
a CPU. Inlined, its doubling steps would be most of a graph. Exports inline it: they have to run
without this package.

Letters as in api.py.
"""

import torch
from torch import Tensor

from metala_vision.kernels._fused import runs_on, why_not
from metala_vision.kernels.linear_recurrence import fused
from metala_vision.kernels.linear_recurrence.chunked import chunked


def _takes_kernels(b: Tensor) -> bool:
    if b.device.type == "cpu":  # the interpreter is for tests, and asked for by name
        return False
    return runs_on(b.device) and not why_not(b)


@torch.library.custom_op("metala_vision::linear_recurrence", mutates_args=())
def node(b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None) -> Tensor:
    """[D, B, N, M, C], contiguous."""
    if _takes_kernels(b):
        return fused.forward(b, log_decay, direction, order)
    h = chunked(b, log_decay, direction, order)
    return (h if direction == "bidirectional" else h.unsqueeze(0)).contiguous()


@node.register_fake
def _(b, log_decay, direction, order):
    directions = 2 if direction == "bidirectional" else 1
    return torch.empty((directions, *b.shape[-4:]), dtype=b.dtype, device=b.device)


def _gradients(d_h, h, b, log_decay, direction, order) -> list[Tensor]:
    """Of b and log_decay."""
    if _takes_kernels(b):
        return list(fused.backward(d_h, h, log_decay, direction, order, b.dim() == 4))
    given = [x.detach().requires_grad_() for x in (b, log_decay)]
    with torch.enable_grad():
        again = chunked(*given, direction, order)
        again = again if direction == "bidirectional" else again.unsqueeze(0)
        return [x.contiguous() for x in torch.autograd.grad(again, given, d_h)]


# Not a custom_op: that runs its function below autograd, which is needed inside.
_library = torch.library.Library("metala_vision", "FRAGMENT")
_library.define(
    "linear_recurrence_backward(Tensor d_h, Tensor h, Tensor b, Tensor log_decay, str direction, "
    "Tensor? order) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):
    _library.impl("linear_recurrence_backward", _gradients, _key)


@torch.library.register_fake("metala_vision::linear_recurrence_backward", lib=_library)
def _(d_h, h, b, log_decay, direction, order):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (b, log_decay)]


def _save(ctx, inputs, output) -> None:
    b, log_decay, ctx.direction, order = inputs
    ctx.save_for_backward(output, b, log_decay, order)


def _backward(ctx, d_h):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a compiled linear_recurrence has no second derivatives; leave it uncompiled"
        )
    h, b, log_decay, order = ctx.saved_tensors
    backward = torch.ops.metala_vision.linear_recurrence_backward
    return *backward(d_h, h, b, log_decay, ctx.direction, order), None, None


node.register_autograd(_backward, setup_context=_save)
