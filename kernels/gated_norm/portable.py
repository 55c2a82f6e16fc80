"""The gated norm in plain scriptable PyTorch: on a CPU, and where a compiler fuses it.

Letters as in reference.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metala_vision.kernels._portable import decay_and_key, in_place


def portable(
    o: Tensor,
    output_gate: Tensor,
    bias: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    gate: Tensor | None,
    v: Tensor | None,
    w_aug: Tensor | None,
    gate_divisor: float,
    norm: str,
    eps: float,
) -> Tensor:
    """[B, N, H, V] in o's dtype, computed in float32 (float64 for float64 o)."""
    over = in_place(o)
    dtype = torch.float64 if o.dtype == torch.float64 else torch.float32
    x = o.to(dtype)
    if w_aug is not None:
        assert q is not None and v is not None
        key = k
        if key is None:
            assert gate is not None
            key = decay_and_key(gate, gate_divisor)[1]
        weighted = q.to(dtype) * (0.5 * w_aug.to(dtype))
        weighted = weighted.mul_(key) if over else weighted * key
        own = weighted.sum(3, keepdim=True) * v.to(dtype)
        x = torch.add(x, own.tanh_() if over else own.tanh(), alpha=0.5)
    if norm == "layer":
        x = F.layer_norm(x, [x.shape[3]], eps=eps)
    else:
        x = x * torch.rsqrt(x.square().mean(3, keepdim=True) + eps)
    raw = output_gate.to(dtype)
    if bias is None:
        return (x * F.silu(raw)).to(o.dtype)
    raw = raw + bias.to(dtype)
    if over:
        return x.mul_(F.silu(raw, inplace=True)).to(o.dtype)
    return (x * F.silu(raw)).to(o.dtype)
