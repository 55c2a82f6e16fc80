"""The definition of gated linear attention: the recurrence, token by token.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

B batch, N tokens, H heads, K key width per head, V value width per head. Slow, short and meant to
be read; every other form is proven against it in float64. It shares no code with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q: Tensor,  # [B, N, H, K]
    v: Tensor,  # [B, N, H, V]
    k: Tensor | None,  # [B, N, H, K]; None: 1 - alpha
    gate: Tensor | None,  # [B, N, H, K], or [2, B, N, H, K] for (forward, backward)
    log_decay: Tensor | None,  # the same shapes, natural logarithm
    gate_divisor: float,
    scale: float,
    direction: str,
    order: Tensor | None,  # [N] or [H, N]
    initial_state: Tensor | None,  # [B, H, K, V]
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, N, H, V] in q.dtype and, where asked for, the last state [B, H, K, V]."""
    B, N, H, K = q.shape
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if gate is not None:
        log_decay = F.logsigmoid(gate.to(compute_dtype)) / gate_divisor
    if log_decay is None:
        log_decay = q.new_zeros(q.shape)
    log_alpha = log_decay.to(compute_dtype).expand(2, B, N, H, K)  # [forward, backward]
    key = -torch.expm1(log_alpha) if k is None else k.to(compute_dtype).expand(2, B, N, H, K)

    # Head h reads token visits[t, h] at step t; x[read] is x [B, N, H, ...] in that sequence.
    visits = torch.arange(N, device=q.device) if order is None else order
    visits = visits.expand(H, N).t().long()
    b, h = torch.arange(B, device=q.device), torch.arange(H, device=q.device)
    read = (b[:, None, None], visits, h)
    q_seq, v_seq = q[read].to(compute_dtype), v[read].to(compute_dtype)

    o = torch.zeros(v.shape, dtype=compute_dtype, device=v.device)
    S = None
    for way in {"forward": (0,), "backward": (1,), "bidirectional": (0, 1)}[direction]:
        alpha, k_seq = log_alpha[way][read].exp(), key[way][read]
        S = torch.zeros(B, H, K, v.shape[-1], dtype=compute_dtype, device=q.device)
        if initial_state is not None:
            S = initial_state.to(compute_dtype)
        outputs = {}
        for t in reversed(range(N)) if way else range(N):
            S = alpha[:, t, :, :, None] * S + k_seq[:, t, :, :, None] * v_seq[:, t, :, None, :]
            outputs[t] = scale * (q_seq[:, t, :, :, None] * S).sum(-2)
        o_seq = torch.stack([outputs[t] for t in range(N)], dim=1)
        o = o.index_put(read, o_seq, accumulate=True)
    return o.to(q.dtype), S if output_final_state else None
