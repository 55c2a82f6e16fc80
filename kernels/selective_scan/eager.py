"""The selective scan in chunks for eager PyTorch: as chunked.py, in place, with its gradient.

B batch, N tokens, E channels, M states of a channel, C either of the two, D directions, L tokens in
a chunk, R rows: chunks of all samples.

A new tensor costs a CPU as much as the operation that fills it, and exp three times exp2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metala_vision.kernels._fused import many_or_second, portable_gradients
from metala_vision.kernels._portable import plainly_eager
from metala_vision.kernels.selective_scan.chunked import CHUNK as L
from metala_vision.kernels.selective_scan.chunked import (
    chunked,
    cut,
    entering_of,
    joined,
    per_direction,
)

LOG2_E = 1.4426950408889634
CHUNK_OF_A_GRAPH = 4  # a graph holds every step of a chunk twice
STATES_AT_ONCE = 2**18  # numbers that the backward pass keeps of a step, for L steps


class Rows:
    """A call's tensors in rows of chunks [D, R, L, C], float32 or float64."""

    def __init__(self, u, delta, A, k, q, skip, delta_bias, direction, order, d_y=None) -> None:
        self.dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.B, self.N = u.shape[1:3]
        self.direction, self.order = direction, order
        self.u, raw, self.k, self.q = (self.cut(x) for x in (u, delta, k, q))
        self.raw = raw if delta_bias is None else raw + delta_bias.to(self.dtype)[:, None, None]
        self.step = F.logsigmoid(-self.raw).neg_()
        D, R, _, E = self.u.shape
        self.step.view(D, self.B, -1, E)[:, :, self.N :] = 0  # no token, no step
        self.into = self.step * self.u
        self.A = A.to(self.dtype).transpose(1, 2).unsqueeze(1).contiguous()  # [D, 1, M, E]
        self.log2_rates = self.A * LOG2_E
        self.skip = None if skip is None else skip.to(self.dtype)[:, None, None]
        self.d_y = self.u if d_y is None else self.cut(d_y)
        self.shape = (D, R, self.A.shape[2], E)  # of states
        self.one_chunk = self.B == R

    def cut(self, x: Tensor) -> Tensor:
        visited = per_direction(x.to(self.dtype), self.direction, self.order)
        return cut(visited, (self.N + L - 1) // L)

    def joined(self, x: Tensor) -> Tensor:
        """Rows as tokens again, [D, B, N, C]."""
        return per_direction(joined(x, self.B, self.N), self.direction, self.order, True)

    def decay(self, i: int, out: Tensor, some: slice = slice(None)) -> Tensor:
        """exp(step_i A) of some rows."""
        step = self.step[:, some, i].unsqueeze(2)
        return torch.mul(step, self.log2_rates, out=out).exp2_()

    def walk(self, h: Tensor, y: Tensor | None) -> Tensor:
        """h behind each row's last step, written over; y [D, R, L, E] is written."""
        a = torch.empty_like(h)
        for i in range(L):
            h.mul_(self.decay(i, a))
            h.addcmul_(self.into[:, :, i].unsqueeze(2), self.k[:, :, i].unsqueeze(3))
            if y is not None:
                torch.sum(torch.mul(h, self.q[:, :, i].unsqueeze(3), out=a), 2, out=y[:, :, i])
        return h

    def entering(self) -> Tensor:
        """The states that enter each row."""
        h = self.u.new_zeros(self.shape)
        if self.one_chunk:
            return h
        return entering_of(self.walk(h, None), self.step.sum(2), self.A, self.B, False)

    def entering_gradient(self) -> Tensor:
        """The c of the step behind each row."""
        c = self.u.new_zeros(self.shape)
        if self.one_chunk:
            return c
        a = torch.empty_like(c)
        for i in range(L - 1, -1, -1):
            c.addcmul_(self.d_y[:, :, i].unsqueeze(2), self.q[:, :, i].unsqueeze(3))
            c.mul_(self.decay(i, a))
        return entering_of(c, self.step.sum(2), self.A, self.B, True)

    def gradients(self, given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Of the seven tensors of a call."""
        D, R, M, E = self.shape
        h_entering, c_entering = self.entering(), self.entering_gradient()
        d_into, d_step = torch.empty_like(self.u), torch.empty_like(self.u)
        d_k, d_q = torch.empty_like(self.k), torch.empty_like(self.q)
        d_A = self.u.new_zeros(D, M, E)
        at_once = max(1, STATES_AT_ONCE // (D * M * E))
        for start in range(0, R, at_once):
            some = slice(start, min(start + at_once, R))
            into, k, q, d_y, step = (
                x[:, some] for x in (self.into, self.k, self.q, self.d_y, self.step)
            )
            h, c = h_entering[:, some].contiguous(), c_entering[:, some].contiguous()
            decays, kept = (h.new_empty(L, *h.shape) for _ in range(2))  # kept: a_t h_{t-1}
            for i in range(L):
                torch.mul(self.decay(i, decays[i], some), h, out=kept[i])
                h = torch.addcmul(kept[i], into[:, :, i].unsqueeze(2), k[:, :, i].unsqueeze(3))
            part, d_rates = torch.empty_like(h), torch.zeros_like(h)
            for i in range(L - 1, -1, -1):
                into_i, d_y_i, step_i = (x[:, :, i].unsqueeze(2) for x in (into, d_y, step))
                k_i, q_i = k[:, :, i].unsqueeze(3), q[:, :, i].unsqueeze(3)
                g = c.addcmul_(d_y_i, q_i)
                torch.addcmul(kept[i], into_i, k_i, out=part)
                torch.sum(part.mul_(d_y_i), 3, out=d_q[:, some, i])
                torch.sum(torch.mul(g, into_i, out=part), 3, out=d_k[:, some, i])
                torch.sum(torch.mul(g, k_i, out=part), 2, out=d_into[:, some, i])
                torch.mul(g, kept[i], out=part)
                d_rates.addcmul_(part, step_i)
                torch.sum(part.mul_(self.A), 2, out=d_step[:, some, i])
                c = g.mul_(decays[i])
            d_A += d_rates.sum(1)
        d_raw = d_step.addcmul_(self.u, d_into).mul_(torch.sigmoid(self.raw))
        d_u = d_into.mul_(self.step)
        if self.skip is not None:
            d_u.addcmul_(self.skip, self.d_y)
        d_bias, d_skip = d_raw.sum((1, 2)), (self.d_y * self.u).sum((1, 2))
        found = (
            self.joined(d_u), self.joined(d_raw), d_A.transpose(1, 2), self.joined(d_k),
            self.joined(d_q), d_skip, d_bias,
        )  # fmt: skip
        return [
            None if x is None else made.to(x.dtype) for x, made in zip(given, found, strict=True)
        ]


class SelectiveScan(torch.autograd.Function):
    """y [D, B, N, E] in float32 or float64. Saves its inputs.

    With g_t = d h_t = d_y_t q_t + c_{t+1} and c_t = a_t g_t, a_t = exp(step_t A):

        d_k_t = sum_E g_t into_t      d_q_t = sum_E d_y_t h_t      d_into_t = sum_M g_t k_t
        d_(step_t A) = g_t a_t h_{t-1}
    """

    @staticmethod
    def forward(ctx, u, delta, A, k, q, skip, delta_bias, direction, order):
        ctx.save_for_backward(u, delta, A, k, q, skip, delta_bias, order)
        ctx.direction = direction
        rows = Rows(u, delta, A, k, q, skip, delta_bias, direction, order)
        y = torch.empty_like(rows.u)
        rows.walk(rows.entering(), y)
        if rows.skip is not None:
            y.addcmul_(rows.skip, rows.u)
        return rows.joined(y)

    @staticmethod
    def backward(ctx, d_y):  # type: ignore[override] # torch declares (ctx, *grads)
        *inputs, order = ctx.saved_tensors
        if many_or_second(d_y):

            def plain(*given: Tensor) -> list[Tensor]:
                return [chunked(*given, ctx.direction, order)]

            found = portable_gradients(plain, [d_y], inputs, ctx.needs_input_grad)
        else:
            found = Rows(*inputs, ctx.direction, order, d_y).gradients(tuple(inputs))
        return *found, None, None


def portable(
    u: Tensor, delta: Tensor, A: Tensor, k: Tensor, q: Tensor, skip: Tensor | None,
    delta_bias: Tensor | None, direction: str, order: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [D, B, N, E]: in place where PyTorch is eager, else as operations of a graph."""
    if plainly_eager(u):
        return SelectiveScan.apply(u, delta, A, k, q, skip, delta_bias, direction, order)
    return chunked(u, delta, A, k, q, skip, delta_bias, direction, order, CHUNK_OF_A_GRAPH)
