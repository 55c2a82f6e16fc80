"""The linear recurrence's kernels as a function with gradients. Letters as in api.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from metala_vision.kernels._fused import many_or_second, portable_gradients, run, with_rows
from metala_vision.kernels.linear_recurrence.chunked import chunked, scan


class Edges(NamedTuple):
    """Between two launches: what enters each segment, of what segments add to a state of 0 and
    their log decay. A recurrence over segments, in PyTorch."""

    added: Tensor  # [D, B, NS, M, C]
    total: Tensor  # [D, B, NS, C]
    entering: Tensor  # as added; written

    def run(self) -> None:
        states = scan(self.total.flatten(0, 1).exp(), self.added.flatten(0, 1))
        self.entering[:, :, 0] = 0
        self.entering[:, :, 1:] = states.view_as(self.added)[:, :, :-1]


def forward(b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None) -> Tensor:
    """h [D, B, N, M, C], without autograd."""
    from metala_vision.kernels.linear_recurrence.triton_scan import forward_launches

    order = None if order is None else order.contiguous()
    b, log_decay = with_rows(b), with_rows(log_decay)
    h, launches = forward_launches(b, log_decay, direction, order, Edges)
    run(launches, b.device)
    return h


def backward(
    d_h: Tensor, h: Tensor, log_decay: Tensor, direction: str, order: Tensor | None, shared: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of b and log_decay, each in its own dtype. shared: both directions had one b."""
    from metala_vision.kernels.linear_recurrence.triton_scan import backward_launches

    order = None if order is None else order.contiguous()
    d_h, log_decay = with_rows(d_h), with_rows(log_decay)  # a sum's gradient is expanded
    d_b, d_log, launches = backward_launches(d_h, h, log_decay, direction, order, Edges)
    run(launches, h.device)
    d_log = d_log.sum(0).to(log_decay.dtype)
    if not shared:
        return d_b, d_log
    return d_b.sum(0) if len(d_b) > 1 else d_b[0], d_log


def alike(b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None) -> Tensor:
    """[D, B, N, M, C] by the portable form."""
    h = chunked(b, log_decay, direction, order)
    return h if direction == "bidirectional" else h.unsqueeze(0)


class Fused(torch.autograd.Function):
    """Saves h and the decays."""

    @staticmethod
    def forward(ctx, b, log_decay, direction, order):
        h = forward(b, log_decay, direction, order)
        ctx.options = (direction, order, b.dim() == 4)
        # b for the portable form alone: it is there anyway
        ctx.save_for_backward(h, b, log_decay)
        return h

    @staticmethod
    def backward(ctx, d_h):  # type: ignore[override] # torch declares (ctx, *grads)
        h, b, log_decay = ctx.saved_tensors
        direction, order, shared = ctx.options
        if many_or_second(d_h):
            gradients = portable_gradients(
                lambda *x: [alike(*x, direction, order)], [d_h], (b, log_decay),
                ctx.needs_input_grad,
            )  # fmt: skip
            return *gradients, None, None
        return *backward(d_h, h, log_decay, direction, order, shared), None, None
