"""The linear recurrence by doubling: the portable fast form, in plain scriptable PyTorch.

B batch, N tokens, C channels of decay, M values that share one, L tokens in a chunk, NC chunks,
P samples and directions together.

Inside chunks of L tokens, log2(L) steps each add what lies s tokens back, s doubling. The states
that leave the chunks are a recurrence of their own, L times as short, and so on: log(N) steps over
tensors that shrink, no loop over tokens, and products of decays that are never divided.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metala_vision.kernels._portable import in_place, plainly_eager


def _inside(a: Tensor, h: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Of each chunk alone: decays from its start [P, NC, L, C], states [P, NC, L, M, C]."""
    over = in_place(h)
    s = 1
    while s < L:
        added = a[:, :, s:].unsqueeze(3) * h[:, :, : L - s]
        if over:
            h[:, :, s:].add_(added)
        else:
            h = torch.cat([h[:, :, :s], h[:, :, s:] + added], 2)
        a = torch.cat([a[:, :, :s], a[:, :, s:] * a[:, :, : L - s]], 2)
        s *= 2
    return a, h


def _between(a: Tensor, h: Tensor) -> Tensor:
    """States behind each chunk, of what chunks add [P, NC, M, C] and leave [P, NC, C], in a graph
    that is the same for every NC: NC^2 C weights."""
    NC = a.shape[1]
    chunk = torch.arange(NC, device=a.device)
    later, earlier = chunk.view(NC, 1, 1), chunk.view(1, NC, 1)
    # Sums of logarithms, all of one sign: a product along a dimension does not exist in ONNX.
    logs = torch.where(later > earlier, a.clamp_min(1.2e-38).log().unsqueeze(2), 0.0)
    weight = torch.where(later >= earlier, logs.cumsum(1).exp(), 0.0)  # [P, NC, NC, C]
    # Not einsum: autocast would take it in 16 bits.
    return (weight.unsqueeze(3) * h.unsqueeze(1)).sum(2)


def scan(a: Tensor, h: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + h_t along the tokens: a [P, N, C], h [P, N, M, C] -> the same."""
    P, N, M, C = h.shape
    any_size = False
    if not torch.jit.is_scripting():
        any_size = isinstance(N, torch.SymInt)
    L = 32 if any_size else 8
    decays: list[Tensor] = []
    states: list[Tensor] = []
    sizes: list[int] = []
    more = True
    while more:
        n = h.shape[1]
        # For any size always some padding, or the graph would hold for multiples of L only, and
        # always two chunks, or it would hold from L tokens on.
        NC = n // L + 2 if any_size else (n + L - 1) // L
        pad = NC * L - n
        if any_size or pad > 0:
            a = F.pad(a, [0, 0, 0, pad], value=1.0)
            h = F.pad(h, [0, 0, 0, 0, 0, pad])
        elif in_place(h):
            h = h.clone()  # of the caller, or of the level below
        a, h = _inside(a.reshape(P, NC, L, C), h.reshape(P, NC, L, M, C), L)
        decays.append(a)
        states.append(h)
        sizes.append(n)
        a, h = a[:, :, L - 1], h[:, :, L - 1]
        more = not any_size and NC > 1
    behind = _between(a, h) if any_size else h  # of one chunk
    for i in range(len(states) - 1, -1, -1):
        h = states[i]
        if any_size:  # a slice of NC - 1 would be of one size
            later = torch.arange(h.shape[1], device=h.device).view(-1, 1, 1) > 0
            entering = torch.where(later, behind.roll(1, 1), 0.0)
            h = h + decays[i].unsqueeze(3) * entering.unsqueeze(2)
        elif h.shape[1] > 1:
            entering = torch.cat([torch.zeros_like(behind[:, :1]), behind[:, :-1]], 1)
            h = h + decays[i].unsqueeze(3) * entering.unsqueeze(2)
        behind = h.reshape(P, h.shape[1] * L, M, C)[:, : sizes[i]]
    return behind


def visited(x: Tensor, order: Tensor | None, reverse: bool) -> Tensor:
    """Tokens (dimension 1) in the sequence in which a direction visits them."""
    if order is not None:
        x = x.index_select(1, order)
    return torch.flip(x, [1]) if reverse else x


def unvisited(x: Tensor, order: Tensor | None, reverse: bool) -> Tensor:
    """The same back in the order of the tokens."""
    if reverse:
        x = torch.flip(x, [1])
    return x if order is None else x.index_select(1, torch.argsort(order))


def _states(b: Tensor, log_decay: Tensor, direction: str, order: Tensor | None) -> Tensor:
    """[D, B, N, M, C] for D directions, in float32 or float64."""
    ways = [False, True] if direction == "bidirectional" else [direction == "backward"]
    found: list[Tensor] = []
    for way in ways:
        into = b if b.dim() == 4 else b[int(way)]
        decay = visited(log_decay.exp(), order, way)
        found.append(unvisited(scan(decay, visited(into, order, way)), order, way))
    return torch.stack(found)


class Recurrence(torch.autograd.Function):
    """`_states` with its gradient, which is the recurrence in the other direction.

    With g_t = d_h_t + a_{t+1} g_{t+1}: the gradient of b_t is g_t, of log a_t g_t a_t h_{t-1}.
    Saves h and log a; autograd through the doubling would keep every step.
    """

    @staticmethod
    def forward(ctx, b, log_decay, direction, order):
        h = _states(b, log_decay, direction, order)
        ctx.save_for_backward(h, log_decay, order)
        ctx.direction, ctx.per_direction = direction, b.dim() == 5
        return h

    @staticmethod
    def backward(ctx, d_h):  # type: ignore[override] # torch declares (ctx, *grads)
        h, log_decay, order = ctx.saved_tensors
        both = ctx.direction == "bidirectional"
        ways = [False, True] if both else [ctx.direction == "backward"]
        d_b, d_log = [], torch.zeros_like(log_decay)
        for i, way in enumerate(ways):
            decay = visited(log_decay, order, way).exp()
            # In the sequence visited: g_t takes the decay of t + 1, h_{t-1} lies one step back.
            later = F.pad(decay[:, 1:], [0, 0, 0, 1], value=1.0)
            g = torch.flip(
                scan(torch.flip(later, [1]), torch.flip(visited(d_h[i], order, way), [1])), [1]
            )
            before = F.pad(visited(h[i], order, way)[:, :-1], [0, 0, 0, 0, 1, 0])
            d_log = d_log + unvisited((g * before).sum(2) * decay, order, way)
            d_b.append(unvisited(g, order, way))
        if not ctx.per_direction and both:
            return d_b[0] + d_b[1], d_log, None, None
        return torch.stack(d_b) if ctx.per_direction else d_b[0], d_log, None, None


def chunked(
    b: Tensor,  # [B, N, M, C], or [2, B, N, M, C] for (forward, backward)
    log_decay: Tensor,  # [B, N, C], natural logarithm
    direction: str,
    order: Tensor | None,  # [N]
) -> Tensor:
    """h in b's dtype: [B, N, M, C], or [2, B, N, M, C] for both directions."""
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    wide, log_decay = b.to(dtype), log_decay.to(dtype)
    if torch.jit.is_scripting():
        h = _states(wide, log_decay, direction, order)
    else:
        if plainly_eager(b):
            h = Recurrence.apply(wide, log_decay, direction, order)
        else:
            h = _states(wide, log_decay, direction, order)
    return (h if direction == "bidirectional" else h[0]).to(b.dtype)
