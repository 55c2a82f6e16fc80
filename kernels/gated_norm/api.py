"""The entrance to the gated norm: validation and the choice of implementation.

B batch, N tokens, H heads, K key width per head, V value width per head.
"""

import torch
from torch import Tensor

from metala_vision.kernels._checks import check_tensor
from metala_vision.kernels._fused import implementations, in_graph
from metala_vision.kernels._impl import choose
from metala_vision.kernels._portable import plainly_eager
from metala_vision.kernels.gated_norm import library
from metala_vision.kernels.gated_norm.fused import Fused
from metala_vision.kernels.gated_norm.portable import portable
from metala_vision.kernels.gated_norm.reference import reference

NORMS = ("layer", "rms")
MAX_KEY_WIDTH = 128
MAX_VALUE_WIDTH = 256


def gated_norm(
    o: Tensor,
    output_gate: Tensor,
    bias: Tensor | None = None,
    *,
    q: Tensor | None = None,
    k: Tensor | None = None,
    gate: Tensor | None = None,
    v: Tensor | None = None,
    w_aug: Tensor | None = None,
    gate_divisor: float = 16.0,
    norm: str = "layer",
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """What stands between a recurrence and its output projection: norm per head, output gate.

        x_t = o_t + tanh(q_t . (w_aug * k_t) v_t / 2) / 2        with w_aug, else x_t = o_t
        y_t = norm(x_t) * SiLU(output_gate_t + bias)

    The first line is MetaLA's self-augmentation sigmoid(q . (w_aug * k) v), less the half that
    norm="layer" takes away.

    Source: MetaLA, arXiv 2411.10741, equations A29 to A38; without w_aug, GLA, arXiv 2312.06635,
    section 4.4, and with norm="rms" RetNet, arXiv 2307.08621, equation 8.

    Args:
        o: [B, N, H, V]; float16, bfloat16, float32 or float64; V <= 256.
        output_gate: [B, N, H, V].
        bias: of the output gate, [H, V].
        q, k: queries and keys [B, N, H, K], K <= 128. k None stands for 1 - alpha, from `gate`.
        gate: raw logits [B, N, H, K], alpha = sigmoid(gate)^(1 / gate_divisor).
        v: values [B, N, H, V].
        w_aug: [H, K]; None leaves the self-augmentation out, and q, k, gate and v unused.
        gate_divisor: > 0.
        norm: "layer" (mean and variance) or "rms" (mean square), over V, without weights.
        eps: added to the variance.
        impl: "auto", "triton", "portable" or "reference"; "auto" is "triton" on a GPU, compiled as
            one node too (from torch 2.7 on), else "portable", which a compiler fuses.
    Returns:
        y [B, N, H, V] in o's dtype.
    Raises:
        ValueError: naming the argument, its value and what is accepted.
    Compute: float32, for float64 o float64.
    """
    _validate(o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps)
    return _run(
        o, output_gate, bias, q, k, gate, v, w_aug, float(gate_divisor), norm, float(eps), impl
    )


def gated_norm_op(
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
    """`gated_norm` for a layer: scriptable, arguments by position, not validated."""
    if torch.jit.is_scripting():
        return portable(
            o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps
        )  # fmt: skip
    else:
        return _run(
            o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps, "auto"
        )  # fmt: skip


def _run(
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
    impl: str,
) -> Tensor:
    if w_aug is None:
        q, k, gate, v = None, None, None, None
    else:
        assert q is not None and v is not None and (k is not None or gate is not None)
        if k is not None:
            gate = None
    arguments = (o, output_gate, bias, q, k, gate, v, w_aug, gate_divisor, norm, eps)
    # What the kernels do not take in one argument, they do not take at all.
    widest = o
    for x in (output_gate, bias, q, k, gate, v, w_aug):
        if x is not None and x.dtype == torch.float64:
            widest = x
    if widest.dtype != torch.float64 and in_graph(o, impl) and library.wanted(o.device):
        return library.node(*arguments)
    form = choose(impl, implementations(widest, impl, ("portable", "reference")))
    if form == "triton" and (impl == "triton" or plainly_eager(o)):
        return Fused.apply(*arguments)
    return (reference if form == "reference" else portable)(*arguments)


def _validate(
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
) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; accepted: {', '.join(NORMS)}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if not gate_divisor > 0:
        raise ValueError(f"gate_divisor must be > 0, got {gate_divisor}")
    if o.dim() != 4 or min(o.shape) < 1:
        raise ValueError(f"o must be [B, N, H, V], no dimension 0, got shape {list(o.shape)}")
    B, N, H, V = o.shape
    if V > MAX_VALUE_WIDTH:
        raise ValueError(f"V <= {MAX_VALUE_WIDTH} is supported, got V={V}")
    named = {"o": o, "output_gate": output_gate, "bias": bias}
    shapes = {"output_gate": [B, N, H, V], "bias": [H, V]}
    if w_aug is not None:
        if q is None or v is None or (k is None and gate is None):
            raise ValueError("w_aug needs q, v, and k or gate; one of them is missing")
        if q.dim() != 4 or not 1 <= q.shape[3] <= MAX_KEY_WIDTH:
            raise ValueError(
                f"q must be [B, N, H, K] with K <= {MAX_KEY_WIDTH}, got shape {list(q.shape)}"
            )
        K = q.shape[3]
        named |= {"q": q, "k": k, "gate": gate, "v": v, "w_aug": w_aug}
        shapes |= {name: [B, N, H, K] for name in ("q", "k", "gate")}
        shapes |= {"v": [B, N, H, V], "w_aug": [H, K]}
    for name, x in named.items():
        if x is None:
            continue
        if name in shapes and list(x.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {list(x.shape)}")
        check_tensor(name, x, "o", o)
