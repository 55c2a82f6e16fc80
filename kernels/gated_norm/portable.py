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
    """[B, N, H, V] in o's dtype."""
    over = in_place(o)
    x = o
    if w_aug is not None and q is not None and v is not None:
        key = k
        if key is None and gate is not None:
            key = decay_and_key(gate, gate_divisor)[1]
        if key is not None:
            weighted = q * (0.5 * w_aug)
            same = weighted.dtype == key.dtype
            weighted = weighted.mul_(key) if over and same else weighted * key
            own = weighted.sum(3, keepdim=True).to(v.dtype) * v
            x = torch.add(x, own.tanh_() if over else own.tanh(), alpha=0.5)
    if norm == "layer":
        x = F.layer_norm(x, [x.shape[3]], eps=eps)
    else:
        wide = x if x.dtype == torch.float64 else x.float()
        x = (wide * torch.rsqrt(wide.square().mean(3, keepdim=True) + eps)).to(x.dtype)
    if over and bias is not None:
        return x.mul_(F.silu(output_gate + bias, inplace=True)).to(o.dtype)
    raw = output_gate if bias is None else output_gate + bias
    return (x * F.silu(raw)).to(o.dtype)
