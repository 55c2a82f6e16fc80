"""Tile functions that the Triton kernels share; imported only where a kernel is.

DOT says how a product's operands are rounded. Sums are float32 always.
    "bf16"     to bfloat16, for 16-bit inputs: float16 has too little range for decays' factors
    "ieee"     not at all
    "tf32"     to TF32, for float32 inputs where the user allows it
    "rounded"  to bfloat16's values, kept in float32: what "bf16" gives, where only float32 runs
               (Triton's interpreter multiplies a bfloat16's bits as integers)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Launch(NamedTuple):
    """One launch of a kernel on a one-dimensional grid: a batch times heads may be above 65535."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]  # in the kernel's order, in front of its constants
    constants: dict[str, Any]
    num_warps: int

    def run(self) -> None:
        self.kernel[(self.programs,)](
            *self.arguments, **self.constants, num_warps=self.num_warps, num_stages=1
        )


@triton.jit
def operand(x, DOT: tl.constexpr):
    """x, rounded as an operand of a product."""
    if DOT == "bf16":
        return x.to(tl.bfloat16)
    elif DOT == "rounded":
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # to nearest, ties to even
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def product(a, b, DOT: tl.constexpr):
    """a @ b in float32."""
    if DOT == "bf16":
        return tl.dot(operand(a, DOT), operand(b, DOT))
    elif DOT == "tf32" or DOT == "tf32x3":
        return tl.dot(operand(a, DOT), operand(b, DOT), input_precision=DOT)
    else:
        return tl.dot(operand(a, DOT), operand(b, DOT), input_precision="ieee")


@triton.jit
def sums(table, x, DOT: tl.constexpr):
    """table @ x for a table of -1, 0 and 1 and x float32: to 2^-16 with DOT "bf16".

    Exponents come from here. One bfloat16 would leave 2^-8 of them, so x goes in as two parts.
    """
    if DOT == "bf16" or DOT == "rounded":
        high = operand(x, DOT)
        low = x - high.to(tl.float32)
        return product(table, high, DOT) + product(table, low, DOT)
    elif DOT == "tf32" or DOT == "tf32x3":
        return tl.dot(table.to(tl.float32), x, input_precision="tf32x3")
    else:
        return tl.dot(table.to(tl.float32), x, input_precision="ieee")


@triton.jit
def sigmoid(x):
    """Without overflow for any x."""
    w = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, w) / (1.0 + w)


@triton.jit
def log_decay_of(gate, rate, DOT: tl.constexpr):
    """log alpha = logsigmoid(gate) * rate, of a raw gate.

    To float32's precision (2^-14 with 16-bit operands) for any gate, from exp alone: a GPU's fast
    logarithm is off by 2^-22 near 1, which for gates of +12 would be a fortieth of the key.
    """
    x = gate.to(tl.float32)
    w = tl.exp(-tl.abs(x))
    # log(1 + w) = 2 artanh(z), z = w / (2 + w) <= 1/3.
    # Left out is y^8 / 17 < 2^-29, and with 16-bit operands y^4 / 9 < 2^-15.
    z = w / (2.0 + w)
    y = z * z
    p = y * (1.0 / 7) + 1.0 / 5
    if DOT != "bf16" and DOT != "rounded":
        p = y * (1.0 / 15) + 1.0 / 13
        p = p * y + 1.0 / 11
        p = p * y + 1.0 / 9
        p = p * y + 1.0 / 7
        p = p * y + 1.0 / 5
    p = p * y + 1.0 / 3
    p = p * y + 1.0
    return (tl.minimum(x, 0.0) - 2.0 * z * p) * rate


@triton.jit
def key_of(log_decay, alpha, DOT: tl.constexpr):
    """1 - alpha, to the same precision."""
    # 1 - exp(a) for a > -1/4 as a series; left out is a^7 / 8! < 2^-29, or a^4 / 5! < 2^-14
    p = 1.0 + log_decay * (1.0 / 4)
    if DOT != "bf16" and DOT != "rounded":
        p = 1.0 + log_decay * (1.0 / 7)
        p = 1.0 + log_decay * (1.0 / 6) * p
        p = 1.0 + log_decay * (1.0 / 5) * p
        p = 1.0 + log_decay * (1.0 / 4) * p
    p = 1.0 + log_decay * (1.0 / 3) * p
    p = 1.0 + log_decay * (1.0 / 2) * p
    return tl.where(log_decay > -0.25, -log_decay * p, 1.0 - alpha)


@triton.jit
def decay_and_key(p_decay, decay_n, p_k, k_n, t, c, m, rate, K: tl.constexpr, DECAY: tl.constexpr,
                  KEY: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """log2 alpha, alpha and the key of the tokens t, in float32; where there is no token, no decay
    and no key.

    DECAY "gate": p_decay holds raw gates; "log": log alpha; "none": alpha is 1. KEY: p_k holds
    keys; otherwise the key is 1 - alpha.
    """
    if DECAY == "gate":
        log_decay = log_decay_of(tile(p_decay, decay_n, t, c, m, K, float("inf")), rate, DOT)
    elif DECAY == "log":
        log_decay = tile(p_decay, decay_n, t, c, m, K, 0.0).to(tl.float32)
    else:
        log_decay = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    log_decay = tl.where(log_decay < -1e4, -1e4, log_decay)  # -inf times 0 would be NaN
    alpha = tl.exp(log_decay)
    if KEY:
        k = tile(p_k, k_n, t, c, m, K, 0.0).to(tl.float32)
    else:
        k = key_of(log_decay, alpha, DOT)
    return log_decay * 1.4426950408889634, alpha, k


@triton.jit
def tokens(p_order, order_h, i_h, start, N, L: tl.constexpr, ORDER: tl.constexpr):
    """The tokens that the L steps from `start` visit, int64 [L], and which of them there are."""
    t = start.to(tl.int64) + tl.arange(0, L)
    m = t < N
    if ORDER:
        t = tl.load(p_order + i_h * order_h + t, mask=m, other=0).to(tl.int64)
    return t, m


@triton.jit
def token_of(p_order, step, N, BACKWARD, ORDER: tl.constexpr):
    """The token of each step, int64, and whether there is one.

    A step is a token in the sequence that a direction visits them: step i of the backward direction
    is token N - 1 - i, or order[N - 1 - i].
    """
    m = (step >= 0) & (step < N)
    t = tl.where(BACKWARD, N - 1 - step, step)
    if ORDER:
        t = tl.load(p_order + t, mask=m, other=0)
    return t.to(tl.int64), m


@triton.jit
def tile(p, stride, t, c, m, C: tl.constexpr, other: tl.constexpr):
    """Rows t and columns c from p, `other` where m is false or the width C has ended."""
    p += t[:, None] * stride + c[None, :]
    return tl.load(p, mask=m[:, None] & (c < C)[None, :], other=other)


@triton.jit
def decay_slope(gate, rate):
    """d log alpha / d gate = sigmoid(-gate) * rate."""
    x = gate.to(tl.float32)
    w = tl.exp(-tl.abs(x))
    return tl.where(x > 0, w, 1.0) / (1.0 + w) * rate
