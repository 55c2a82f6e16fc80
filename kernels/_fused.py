"""What functions over Triton kernels share: where kernels run, and what they leave to PyTorch.

Triton is imported when a call needs it, never before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


@cache
def runs_on(device: torch.device) -> bool:
    """Whether there are kernels for a device: a GPU of compute capability 8.0 on, or AMD's."""
    if device.type == "cpu":
        return interpreted()
    # The interpreter would take a GPU's tensors too, and multiply 16-bit ones wrongly.
    if device.type != "cuda" or not torch.cuda.is_available() or interpreted():
        return False
    if find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def triton_version() -> tuple[int, ...]:
    """Major and minor."""
    from triton import __version__

    return tuple(int(n) for n in __version__.split(".")[:2])


@torch.compiler.assume_constant_result
def carries_tuples() -> bool:
    """Whether Triton carries a tuple through a loop: from 3.3 on, which comes with PyTorch 2.7."""
    return triton_version() >= (3, 3)


def why_not(q: Tensor) -> str:
    """What of a call the kernels do not take, in words; nothing if they take it."""
    if q.dtype == torch.float64:
        return "float64"
    if torch._C._are_functorch_transforms_active():
        return "transforms of functorch"
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return f"{q.dtype} in Triton's interpreter"
    return ""


def implementations(
    x: Tensor, impl: str, portable: tuple[str, ...] = ("chunked", "reference")
) -> tuple[str, ...]:
    """Those of a call on x, the one that "auto" stands for first.

    Raises ValueError for impl="triton" where the kernels do not take the call.
    """
    # Triton's interpreter, on the CPU, is for tests, and has to be asked for by name.
    if x.device.type != "cuda" and impl != "triton":
        return portable
    if torch.compiler.is_compiling() or not runs_on(x.device):
        return portable
    missing = why_not(x)
    if not missing:
        return ("triton", *portable)
    if impl == "triton":
        raise ValueError(f"impl='triton' does not take {missing}; accepted: auto, {portable[0]}")
    return portable


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


_whole = False


@contextmanager
def whole_operators() -> Iterator[None]:
    """Inside, a layer's call of an operator is one node for PyTorch's dispatcher, as it is for
    torch.compile: what counts or records calls sees the operator, not the form that computes it."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def in_graph(x: Tensor, impl: str) -> bool:
    """Whether a call is to be one node: with torch.compile at work, without torch.export or
    functorch, or inside whole_operators."""
    if _whole and impl == "auto":
        return True
    if not torch.compiler.is_compiling():
        return False
    # The node chooses as "auto" does.
    if impl != "auto" and not (impl == "chunked" and x.device.type == "cpu"):
        return False
    # not is_exporting(): torch.compile takes that for is_compiling() (torch 2.11)
    exporting = getattr(torch.compiler, "_is_exporting_flag", True)
    if exporting or torch._C._are_functorch_transforms_active():
        return False
    return x.device.type in ("cpu", "cuda")


def run(launches: Iterable[Any], device: torch.device) -> None:
    """Each launch, one after the other."""
    if device.type == "cpu":
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):  # Triton launches on the current one
        for launch in launches:
            launch.run()


def with_rows(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not contiguous, as kernels read it: behind a convolution
    channels may lie anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def many_or_second(*incoming: Tensor | None) -> bool:
    """Whether a backward pass wants gradients of its own (create_graph), or many at once
    (is_grads_batched, functorch): the kernels have neither."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in incoming)
    )


def portable_gradients(
    function: Callable[..., Sequence[Tensor | None]],
    incoming: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the inputs that need one, through the portable form and with autograd's graph.

    function: of the inputs; gives the outputs, one for each of `incoming`. It gets aliases: an
    input may have been made from another one, and that way from one to the other is not its own.
    """
    create_graph = torch.is_grad_enabled()
    device_type = next(x.device.type for x in inputs if x is not None)
    with torch.enable_grad(), torch.autocast(device_type, enabled=False):
        aliases: list[Tensor | None] = []
        for x, n in zip(inputs, needed, strict=False):
            if x is not None:
                x = x.view_as(x) if create_graph else x.detach().requires_grad_(n)
            aliases.append(x)
        given = [
            (x, d)
            for x, d in zip(function(*aliases), incoming, strict=True)
            if x is not None and d is not None
        ]
        found = torch.autograd.grad(
            [x for x, _ in given],
            [x for x, n in zip(aliases, needed, strict=False) if n and x is not None],
            [d for _, d in given], create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
    made = iter(found)
    return [next(made) if n else None for _, n in zip(inputs, needed, strict=False)]
