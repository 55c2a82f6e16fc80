"""What every operator asks of its arguments, in the same words."""

import torch
from torch import Tensor

from metala_vision.kernels._portable import plainly_eager

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def values_at_hand(x: Tensor) -> bool:
    """Whether values can be looked at without a wait: not on a GPU, not while tracing."""
    if isinstance(x, torch.nn.Parameter):
        x = x.detach()
    return x.device.type == "cpu" and plainly_eager(x)


def check_beside(name: str, x: Tensor, of: str, other: Tensor) -> None:
    """A ValueError unless the argument `name` is on the device of another one, called `of`."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {of} on {other.device}; one device is needed")


def check_dtype(name: str, x: Tensor) -> None:
    """A ValueError unless the argument `name` has a dtype that operators take."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name} has dtype {x.dtype}; accepted: {', '.join(str(d) for d in DTYPES)}"
        )


def check_rows(name: str, x: Tensor) -> None:
    """A ValueError unless the last dimension of the argument `name` is contiguous."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} needs a contiguous last dimension, got strides {list(x.stride())}"
        )


def check_tensor(name: str, x: Tensor, of: str, other: Tensor) -> None:
    """A ValueError unless the argument `name` passes check_beside, check_dtype and check_rows."""
    check_beside(name, x, of, other)
    check_dtype(name, x)
    check_rows(name, x)


def check_order(order: Tensor | None, N: int, of: str, x: Tensor, H: int | None = None) -> None:
    """A ValueError unless order is None or a permutation [N], or [H, N] for one of each head,
    beside the argument x, called `of`. Its values are looked at where they are at hand."""
    if order is None:
        return
    shapes = [[N]] if H is None else [[N], [H, N]]
    if list(order.shape) not in shapes or order.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"order must be {' or '.join(f'{s}' for s in shapes)} int32 or int64, "
            f"got {order.dtype} {list(order.shape)}"
        )
    check_beside("order", order, of, x)
    if not values_at_hand(order):
        return
    visits = torch.arange(N, dtype=order.dtype).expand(order.shape)
    if not torch.equal(order.sort(dim=-1).values, visits):
        raise ValueError(
            f"order must hold each of 0 ... {N - 1} once, starts with "
            f"{order.flatten()[:8].tolist()}"
        )
