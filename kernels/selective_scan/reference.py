"""The definition of the selective scan: token by token.

    step_t = softplus(delta_t + delta_bias)                        [E]
    h_t    = exp(step_t A) * h_{t-1} + (step_t u_t) k_t^T          [E, M], elementwise
    y_t    = h_t q_t + skip * u_t                                  [E]

B batch, N tokens, E channels, M states of a channel, D directions. Slow, short and meant to be
read; every other form is proven against it in float64. It shares no code with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    u: Tensor,  # [D, B, N, E]
    delta: Tensor,  # [D, B, N, E]
    A: Tensor,  # [D, E, M]
    k: Tensor,  # [D, B, N, M]
    q: Tensor,  # [D, B, N, M]
    skip: Tensor | None,  # [D, E]
    delta_bias: Tensor | None,  # [D, E]
    direction: str,
    order: Tensor | None,  # [N]
) -> Tensor:
    """y of each direction [D, B, N, E] in float32, or float64 for float64 u."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A, k, q = (x.to(dtype) for x in (u, delta, A, k, q))
    D, B, N, E = u.shape
    visits = list(range(N)) if order is None else order.tolist()
    found = []
    for d in range(D):
        raw = delta[d] if delta_bias is None else delta[d] + delta_bias[d].to(dtype)
        step = -F.logsigmoid(-raw)  # F.softplus is x itself above 20
        h = u.new_zeros(B, E, A.shape[2])
        y = {}
        for t in reversed(visits) if direction == "backward" or d == 1 else visits:
            into = step[:, t] * u[d, :, t]
            h = (step[:, t, :, None] * A[d]).exp() * h + into[:, :, None] * k[d, :, t, None, :]
            y[t] = (h * q[d, :, t, None, :]).sum(2)
        found.append(torch.stack([y[t] for t in range(N)], 1))
    out = torch.stack(found)
    return out if skip is None else out + skip.to(dtype)[:, None, None] * u
