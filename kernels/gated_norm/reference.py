"""The definition of the gated norm: what a mixer does between its recurrence and its projection.

    x_t = o_t + tanh(q_t . (w_aug * k_t) v_t / 2) / 2        with self-augmentation, else o_t
    y_t = norm(x_t) * SiLU(output_gate_t + bias)             per head

B batch, N tokens, H heads, K key width per head, V value width per head. Slow, short and meant to
be read; every other form is proven against it in float64. It shares no code with them.
"""

import torch
from torch import Tensor


def reference(
    o: Tensor,  # [B, N, H, V]
    output_gate: Tensor,  # [B, N, H, V]
    bias: Tensor | None,  # [H, V]
    q: Tensor | None,  # [B, N, H, K]
    k: Tensor | None,  # [B, N, H, K]; None: 1 - alpha
    gate: Tensor | None,  # [B, N, H, K], alpha = sigmoid(gate)^(1 / gate_divisor)
    v: Tensor | None,  # [B, N, H, V]
    w_aug: Tensor | None,  # [H, K]; None: no self-augmentation
    gate_divisor: float,
    norm: str,
    eps: float,
) -> Tensor:
    """[B, N, H, V] in o's dtype."""
    dtype = torch.float64 if o.dtype == torch.float64 else torch.float32
    x = o.to(dtype)
    if w_aug is not None:
        assert q is not None and v is not None
        if k is None:
            assert gate is not None
            alpha = torch.sigmoid(gate.to(dtype)) ** (1 / gate_divisor)
            key = 1 - alpha
        else:
            key = k.to(dtype)
        own = (q.to(dtype) * w_aug.to(dtype) * key).sum(-1, keepdim=True)
        x = x + torch.tanh(own * v.to(dtype) / 2) / 2
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    raw = output_gate.to(dtype) if bias is None else output_gate.to(dtype) + bias.to(dtype)
    return (normed * raw * torch.sigmoid(raw)).to(o.dtype)
