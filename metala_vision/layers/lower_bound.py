"""Decays that are bounded from below, the bounds learned over all layers: HGRN's and HGRN2's.

C width, l a layer.
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag


@register_notrace_function
def bounded_log_decay(gate: Tensor, lower_bound: Tensor | None) -> Tensor:
    """log f, f = gamma + (1 - gamma) sigmoid(gate), gamma [C] in [0, 1), gate [..., C]; float32 at
    least.

    As log(1 - (1 - gamma) sigmoid(-gate)): exact relative to its value near 0, where memory is
    long, and everywhere to the resolution of 1 in f, which is also the least f.
    """
    double = gate.dtype == torch.float64
    gate = gate if double else gate.float()
    lost = torch.sigmoid(-gate)
    if lower_bound is not None:
        lost = lost * (1.0 - lower_bound.to(gate.dtype))
    return torch.log1p(-lost.clamp_max(1.0 - (2.0**-53 if double else 2.0**-24)))


@register_notrace_function
def cumulative_shares(weight: Tensor) -> Tensor:
    """Of softmax(weight) over the rows, the sums of the rows 1 ... l; 0 for l = 0."""
    share = (weight if weight.dtype == torch.float64 else weight.float()).softmax(0)
    return torch.cat([torch.zeros_like(share[:1]), share[1:]]).cumsum(0)


class LowerBounds(nn.Module):
    """The least decay of every layer, learned, from 0 in the first layer up.

        P = softmax(weight) over the layers
        gamma_l = P_1 + ... + P_l                                gamma_0 = 0

    Source: HGRN, arXiv 2311.04823, section 3.2, as released by its authors.

    Args:
        depth: number of layers. dim: C.
    """

    def __init__(self, depth: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All layers alike: gamma_l = l / depth."""
        nn.init.zeros_(self.weight)

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW should not decay although they are matrices."""
        return {"weight"}

    def forward(self) -> Tensor:
        """gamma [depth, C], in float32 at least: rounded to 16 bits it may be 1."""
        return cumulative_shares(self.weight)
