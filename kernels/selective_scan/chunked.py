"""The selective scan in chunks: the portable fast form, in plain scriptable PyTorch.

B batch, N tokens, E channels, M states of a channel, C either of the two, D directions, L tokens in
a chunk, NC chunks, R = B NC rows: chunks of all samples. A state is [M, E], channels last.

L steps, each for all chunks at once, carry only the states of one token a chunk: they find what a
chunk adds to a state of 0. What enters the chunks is a recurrence over chunks, by doubling. L more
steps start from there and give the outputs. No loop grows with N, and products of decays are never
divided.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metala_vision.kernels.linear_recurrence.chunked import scan, unvisited, visited

CHUNK = 16


def per_direction(x: Tensor, direction: str, order: Tensor | None, back: bool = False) -> Tensor:
    """x [D, B, N, C] in the sequence in which its direction visits the tokens; or back again."""
    found: list[Tensor] = []
    for i in range(x.shape[0]):
        reverse = direction == "backward" or i == 1
        found.append(unvisited(x[i], order, reverse) if back else visited(x[i], order, reverse))
    return torch.stack(found)


def cut(x: Tensor, NC: int, L: int = CHUNK) -> Tensor:
    """[D, B, N, C] -> [D, R, L, C], with zeros behind the last token."""
    D, B, N, C = x.shape
    return F.pad(x, [0, 0, 0, NC * L - N]).reshape(D, B * NC, L, C)


def joined(x: Tensor, B: int, N: int) -> Tensor:
    """[D, R, L, C] -> [D, B, N, C]."""
    D, C = x.shape[0], x.shape[3]
    return x.reshape(D, B, -1, C)[:, :, :N]


def entering_of(added: Tensor, total: Tensor, A: Tensor, B: int, reverse: bool) -> Tensor:
    """What enters chunks [D, R, M, E], of what they add and their sums of step sizes [D, R, E];
    reverse begins with the last chunk."""
    D, R, M, E = added.shape
    NC = R // B
    decay = torch.exp(total.unsqueeze(2) * A).reshape(D * B, NC, M * E)
    added = added.reshape(D * B, NC, 1, M * E)
    if reverse:
        decay, added = torch.flip(decay, [1]), torch.flip(added, [1])
    behind = scan(decay, added)
    # Shifted by one; not by a slice, which an export for any size would tie to one.
    first = torch.arange(NC, device=behind.device).view(-1, 1, 1) == 0
    entering = torch.where(first, 0.0, behind.roll(1, 1))
    if reverse:
        entering = torch.flip(entering, [1])
    return entering.reshape(D, R, M, E)


def _outputs(
    step: Tensor, into: Tensor, k: Tensor, q: Tensor, A: Tensor, B: int, L: int = CHUNK
) -> Tensor:
    """y [D, R, L, E], without the skip, for a graph: nothing in place. A [D, 1, M, E]."""
    h = torch.zeros_like(into[:, :, :1]) * A
    for i in range(L):
        a = torch.exp(step[:, :, i].unsqueeze(2) * A)
        h = a * h + into[:, :, i].unsqueeze(2) * k[:, :, i].unsqueeze(3)
    h = entering_of(h, step.sum(2), A, B, False)
    y: list[Tensor] = []
    for i in range(L):
        a = torch.exp(step[:, :, i].unsqueeze(2) * A)
        h = a * h + into[:, :, i].unsqueeze(2) * k[:, :, i].unsqueeze(3)
        y.append((h * q[:, :, i].unsqueeze(3)).sum(2))
    return torch.stack(y, 2)


def chunked(
    u: Tensor,  # [D, B, N, E]
    delta: Tensor,  # [D, B, N, E]
    A: Tensor,  # [D, E, M]
    k: Tensor,  # [D, B, N, M]
    q: Tensor,  # [D, B, N, M]
    skip: Tensor | None,  # [D, E]
    delta_bias: Tensor | None,  # [D, E]
    direction: str,
    order: Tensor | None,  # [N]
    L: int = CHUNK,
) -> Tensor:
    """y of each direction [D, B, N, E] in float32, or float64 for float64 u."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    B, N = u.shape[1], u.shape[2]
    any_size = False
    if not torch.jit.is_scripting():
        any_size = isinstance(N, torch.SymInt)
    NC = N // L + 1 if any_size else (N + L - 1) // L
    raw = delta.to(dtype)
    if delta_bias is not None:
        raw = raw + delta_bias.to(dtype).unsqueeze(1).unsqueeze(1)
    wide, step = u.to(dtype), -F.logsigmoid(-raw)  # F.softplus is x itself above 20
    tokens = [step, step * wide, k.to(dtype), q.to(dtype)]
    rows = [cut(per_direction(x, direction, order), NC, L) for x in tokens]
    rates = A.to(dtype).transpose(1, 2).unsqueeze(1)
    y = _outputs(rows[0], rows[1], rows[2], rows[3], rates, B, L)
    y = per_direction(joined(y, B, N), direction, order, True)
    return y if skip is None else y + skip.to(dtype).unsqueeze(1).unsqueeze(1) * wide
