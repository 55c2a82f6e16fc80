"""What the operators' nodes of compiled graphs share, forward and backward."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from metala_vision.kernels._fused import portable_gradients, runs_on, why_not

_library = torch.library.Library("metala_vision", "FRAGMENT")


def takes_kernels(x: Tensor) -> bool:
    """Whether a node computes with kernels: on a GPU that has them. Triton's interpreter, on the
    CPU, is for tests, and asked for by name."""
    return x.device.type != "cpu" and runs_on(x.device) and not why_not(x)


@torch.compiler.assume_constant_result
def wanted(device: torch.device) -> bool:
    """Whether graphs on a device hold a node that stands for kernels alone: not on a CPU, where a
    compiler writes better code than the portable form."""
    return device.type == "cuda" and runs_on(device)


def register_backward(
    schema: str, function: Callable[..., list[Tensor]], fake: Callable[..., list[Tensor]]
) -> None:
    """The node of a backward pass, on CPU and GPU; fake: what its results are like.

    No custom_op: that runs its function below autograd, which the portable form needs.
    """
    name = schema.split("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"metala_vision::{name}", fake, lib=_library)


def like(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Contiguous tensors as those that are not None, for `fake`."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors if x is not None]


def gradients(
    function: Callable[..., Sequence[Tensor | None]],
    d_y: Tensor,
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Of the inputs that are needed, or of all that are there, by the portable form; contiguous.

    function: of the inputs; gives one output.
    """
    needed = [x is not None for x in inputs] if needed is None else needed
    with torch.no_grad():
        found = portable_gradients(function, [d_y], inputs, needed)
    made = [x.contiguous() for x in found if x is not None]
    if len(made) != sum(needed):
        raise RuntimeError("an input that is to have a gradient is not used")
    return made


def by_place(found: Iterable[Tensor], given: Iterable[object]) -> list[Tensor | None]:
    """What was found, with None at the places where nothing was given."""
    each = iter(found)
    return [next(each) if there else None for there in given]


def refuse_second_derivatives(name: str) -> None:
    """A RuntimeError in a backward pass that is to have a graph: a node's would have none."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"a compiled {name} has no second derivatives; leave it uncompiled")
