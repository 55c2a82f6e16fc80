"""The selective scan's kernels as a function with gradients. Letters as in api.py."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metala_vision.kernels._fused import many_or_second, portable_gradients, run, with_rows
from metala_vision.kernels.linear_recurrence.chunked import scan
from metala_vision.kernels.selective_scan.chunked import chunked


def out_type(u: Tensor) -> torch.dtype:
    """Of y by direction: two are summed in float32 at least, and rounded then."""
    return u.dtype if u.shape[0] == 1 else torch.promote_types(u.dtype, torch.float32)


class Edges(NamedTuple):
    """Between two launches: what enters each segment, of what segments add to a state of 0 and
    their sums of step sizes. A recurrence over segments, in PyTorch."""

    added: Tensor  # [D, B, NS, M, E]
    total: Tensor  # [D, B, NS, E]
    entering: Tensor  # as added; written
    A: Tensor  # [D, E, M]
    reverse: bool  # begin with the last segment

    def run(self) -> None:
        D, B, NS, M, E = self.added.shape
        rates = self.A.transpose(1, 2)[:, None, None]
        decay = (self.total.unsqueeze(3) * rates).exp().reshape(D * B, NS, M * E)
        added = self.added.reshape(D * B, NS, 1, M * E)
        if self.reverse:
            decay, added = decay.flip(1), added.flip(1)
        behind = scan(decay, added)[:, :-1]
        if self.reverse:
            behind = behind.flip(1)
        first = NS - 1 if self.reverse else 0
        self.entering[:, :, first] = 0
        rest = self.entering[:, :, :-1] if self.reverse else self.entering[:, :, 1:]
        rest.copy_(behind.reshape(rest.shape))


def _call(inputs: tuple[Any, ...], direction: str, order: Tensor | None) -> Any:
    from metala_vision.kernels.selective_scan.triton_fwd import Call

    u, delta, A, k, q, skip, bias = inputs
    wide = [None if x is None else x.to(torch.float32).contiguous() for x in (A, skip, bias)]
    order = None if order is None else order.contiguous()
    u, delta, k, q = (with_rows(x) for x in (u, delta, k, q))
    return Call(u, delta, wide[0], k, q, wide[1], wide[2], direction, order)


def forward(inputs: tuple[Any, ...], direction: str, order: Tensor | None) -> Tensor:
    """y [D, B, N, E] in out_type(u), without autograd. inputs: the seven tensors of a call."""
    from metala_vision.kernels.selective_scan.triton_fwd import forward_launches

    call = _call(inputs, direction, order)
    y, launches = forward_launches(call, out_type(call.u), Edges)
    run(launches, y.device)
    return y


def backward(
    d_y: Tensor, inputs: tuple[Any, ...], direction: str, order: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the seven, each in its own dtype."""
    from metala_vision.kernels.selective_scan.triton_bwd import backward_launches

    d_y = with_rows(d_y)  # a sum's gradient is expanded
    made, launches = backward_launches(_call(inputs, direction, order), d_y, Edges)
    run(launches, d_y.device)
    found = (
        made.d_u, made.d_delta, made.d_A.sum((1, 2)).transpose(1, 2), made.d_k.sum(0),
        made.d_q.sum(0), made.d_skip.sum((1, 2)), made.d_bias.sum((1, 2)),
    )  # fmt: skip
    return [None if x is None else d.to(x.dtype) for x, d in zip(inputs, found, strict=True)]


class Fused(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx, u, delta, A, k, q, skip, delta_bias, direction, order):
        inputs = (u, delta, A, k, q, skip, delta_bias)
        ctx.save_for_backward(*inputs, order)
        ctx.direction = direction
        return forward(inputs, direction, order)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[override] # torch declares (ctx, *grads)
        *inputs, order = ctx.saved_tensors
        if many_or_second(d_y):

            def portable(*given: Tensor) -> list[Tensor]:
                return [chunked(*given, ctx.direction, order).to(d_y.dtype)]

            found = portable_gradients(portable, [d_y], inputs, ctx.needs_input_grad)
        else:
            found = backward(d_y, tuple(inputs), ctx.direction, order)
        return *found, None, None
