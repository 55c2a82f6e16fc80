"""The definition of the linear recurrence: token by token.

    h_t = exp(log_decay_t) h_{t-1} + b_t                     elementwise

B batch, N tokens, C channels of decay, M values that share one. Slow, short and meant to be read;
every other form is proven against it in float64. It shares no code with them.
"""

import torch
from torch import Tensor


def reference(
    b: Tensor,  # [B, N, M, C], or [2, B, N, M, C] for (forward, backward)
    log_decay: Tensor,  # [B, N, C], natural logarithm
    direction: str,
    order: Tensor | None,  # [N]
) -> Tensor:
    """h in b's dtype: [B, N, M, C], or [2, B, N, M, C] for both directions."""
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    N = b.shape[-3]
    decay = log_decay.to(dtype).exp()
    ways = {"forward": (0,), "backward": (1,), "bidirectional": (0, 1)}[direction]
    visits = list(range(N)) if order is None else order.tolist()
    found = []
    for way in ways:
        into = (b if b.dim() == 4 else b[way]).to(dtype)
        h = torch.zeros_like(into[:, 0])
        states = {}
        for t in reversed(visits) if way else visits:
            h = decay[:, t].unsqueeze(1) * h + into[:, t]
            states[t] = h
        found.append(torch.stack([states[t] for t in range(N)], 1))
    return (found[0] if len(found) == 1 else torch.stack(found)).to(b.dtype)
