"""The entrance to the depthwise convolution: validation and the choice of implementation.

B batch, Gh x Gw the token grid, C width, Th x Tw taps.
"""

import torch
from torch import Tensor

from metala_vision.kernels._checks import check_beside, check_dtype
from metala_vision.kernels._fused import (
    carries_tuples,
    implementations,
    in_graph,
    under_autocast,
)
from metala_vision.kernels._impl import choose
from metala_vision.kernels._portable import plainly_eager
from metala_vision.kernels.depthwise_conv import library
from metala_vision.kernels.depthwise_conv.fused import Fused
from metala_vision.kernels.depthwise_conv.portable import portable
from metala_vision.kernels.depthwise_conv.reference import reference

MAX_TAPS = 9  # of the kernels


def depthwise_conv_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top: int = 0,
    left: int = 0,
    impl: str = "auto",
) -> Tensor:
    """A short depthwise convolution of a token map, and SiLU.

        z_{i, j} = bias + sum over r, s of weight_{r, s} x_{i + r - top, j + s - left}
        y = z sigmoid(z)

    per channel, with x = 0 outside the grid. 3 x 3 taps with top = left = 1 are centred; over a
    sequence (Gh = 1), Tw taps with left = Tw - 1 see a token and those in front of it.

    Source: the operation of Mamba, arXiv 2312.00752, section 3.4, and MetaLA, arXiv 2411.10741,
    section 4, on sequences; of ViG, arXiv 2405.18425, on the grid.

    Args:
        x: [B, Gh, Gw, C]; float16, bfloat16, float32 or float64.
        weight: [C, Th, Tw]; the kernels take up to 9 taps.
        bias: [C].
        top, left: rows above and columns to the left of a token that the taps see, 0 to Th - 1 and
            Tw - 1.
        impl: "auto", "triton", "portable" or "reference"; "auto" is "triton" on a GPU, compiled as
            one node too (from torch 2.7 on), else "portable", the library's convolution.
    Returns:
        y [B, Gh, Gw, C] in x's dtype; under autocast, for x and weight in 16 bits or float32, in
        autocast's.
    Raises:
        ValueError: naming the argument, its value and what is accepted.
    Compute: the kernels float32, portable x's dtype.
    """
    _validate(x, weight, bias, top, left)
    return _run(x, weight, bias, top, left, impl)


def depthwise_conv_silu_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int
) -> Tensor:
    """`depthwise_conv_silu` for a layer: scriptable, arguments by position, not validated."""
    if torch.jit.is_scripting():
        return portable(x, weight, bias, top, left)
    else:
        return _run(x, weight, bias, top, left, "auto")


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int, impl: str) -> Tensor:
    given = as_autocast(x)
    # Not within whole_operators: PyTorch counts the operations of its convolution by itself.
    in_node = torch.compiler.is_compiling() and in_graph(x, impl) and library.wanted(x.device)
    if in_node and not _left_out(given, weight, bias):
        return library.node(given, weight, bias, top, left)
    form = choose(impl, implementations(given, impl, ("portable", "reference")))
    if form == "reference":
        return reference(given, weight, bias, top, left)
    # The map as it came: within vmap autocast does not reach the convolution's weights.
    if form == "portable" or (impl == "auto" and not plainly_eager(x)):
        return portable(x, weight, bias, top, left)
    missing = _left_out(given, weight, bias)
    if not missing:
        return Fused.apply(given, weight, bias, top, left)
    if impl == "triton":
        raise ValueError(f"impl='triton' does not take {missing}; accepted: auto, portable")
    return portable(x, weight, bias, top, left)


def _left_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """What of a call the kernels leave to the library's convolution, in words."""
    taps = list(weight.shape[1:])
    if taps[0] * taps[1] > MAX_TAPS:
        return f"{taps[0]} x {taps[1]} taps, more than {MAX_TAPS}"
    if x.numel() == 0:
        return "a map of no tokens"
    # A layer's call is not validated: what the library refuses, it is left to refuse.
    for t in (weight,) if bias is None else (weight, bias):
        if t.dtype == torch.float64 or (t.dtype != x.dtype and not under_autocast(x)):
            return f"{t.dtype} parameters beside {x.dtype}"
        if t.shape[0] != x.shape[3] or t.device != x.device:
            return "parameters that do not fit the map"
    return "" if carries_tuples() else "its tuples before Triton 3.3, which PyTorch 2.7 brings"


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast has convolutions."""
    if under_autocast(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int) -> None:
    if x.dim() != 4 or min(x.shape) < 1:
        raise ValueError(f"x must be [B, Gh, Gw, C], no dimension 0, got shape {list(x.shape)}")
    C = x.shape[3]
    if weight.dim() != 3 or weight.shape[0] != C or min(weight.shape) < 1:
        raise ValueError(f"weight must be [C, Th, Tw] with C={C}, got shape {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [C]:
        raise ValueError(f"bias must have shape [{C}], got {list(bias.shape)}")
    for name, given, taps in (("top", top, weight.shape[1]), ("left", left, weight.shape[2])):
        if not 0 <= given < taps:
            raise ValueError(f"{name} must be 0 to {taps - 1} for {taps} taps, got {given}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        check_beside(name, t, "x", x)
        check_dtype(name, t)
        if t.dtype != x.dtype and not under_autocast(x):
            raise ValueError(f"{name} has dtype {t.dtype}, x {x.dtype}; one dtype is needed")
