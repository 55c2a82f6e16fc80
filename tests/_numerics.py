"""Inputs and the error rule: one rule for every operator, stated here and nowhere else.

Relative RMS error against the float64 reference on the same (rounded) inputs, for the output and
every gradient:

    float32             <= 1e-5
    bfloat16, float16   <= 5e-3; 1e-2 for the gradient of the gate

1e-5 is about 100 float32 roundings (6e-8), for sums of up to 1024 products. A 16-bit result is
rounded once, 2^-9 = 2e-3 for bfloat16, from a computation in float32; 5e-3 leaves room for the
rounding of the incoming gradient. The rule also allows twice the error of the same mathematics in
eager 16-bit PyTorch; the portable form does not need it.
"""

import torch
from torch import Tensor

LENGTHS = (1, 2, 15, 16, 17, 49, 64, 196, 197, 256, 257, 1024)


def _some(share: float, low: float, high: float, x: Tensor) -> Tensor:
    return torch.where(torch.rand(x.shape, generator=_generator(5)) < share, low, high).to(x)


# Raw gates: name -> logits from standard normal x.
GATES = {
    "N(0,1)": lambda x: x,
    "N(0,5)": lambda x: 5 * x,
    "N(-20,20)": lambda x: 20 * x - 20,
    "all-100": lambda x: torch.full_like(x, -100),
    "half-100-half+8": lambda x: _some(0.5, -100.0, 8.0, x),
    "half-300-half+8": lambda x: _some(0.5, -300.0, 8.0, x),
    # The worst found for a form that subtracts sums: a few steep tokens among mild ones.
    "tenth-31-rest+3": lambda x: _some(0.1, -31.0, 3.0, x),
    "hundredth-200-rest+20": lambda x: _some(0.01, -200.0, 20.0, x),
}

# Two ways to compute the same in float32 differ by what either may be off: a hundredth of the rule
# for exponents of a few units, a tenth for the largest that the portable form takes apart.
SAME = 1e-6


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64).to(dtype)


def relative_rms(actual: Tensor, truth: Tensor, least: float = 1e-300) -> float:
    """RMS of the difference over RMS of the truth; 0 where both are 0, inf where not finite.

    A truth with a smaller norm than `least` counts as one of that norm.
    """
    difference = actual.double() - truth.double()
    if not torch.isfinite(difference).all():
        return float("inf")
    return (difference.norm() / truth.double().norm().clamp_min(least)).item()


def bound(dtype: torch.dtype, name: str) -> float:
    """The error rule for the output or gradient of that name."""
    if dtype == torch.float32:
        return 1e-5
    return 1e-2 if name == "gate" else 5e-3
