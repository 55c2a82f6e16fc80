"""The processes of a run: the device of each, how they agree, and the signals that end it."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from .errors import ReportedError, UserError, one_line

# What a scheduler sends before it kills: Slurm (--signal=USR1@60), Kubernetes, spot machines.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def create_accelerator(mixed_precision: str) -> Accelerator:
    """accelerate's view of this machine: a GPU for each process where there is one, else the CPU.

    Raises:
        UserError: fp16 without a GPU; processes that do not find each other.
    """
    has_device = torch.cuda.is_available() or torch.backends.mps.is_available()
    if mixed_precision == "fp16" and not has_device:
        raise UserError("run.mixed_precision='fp16' needs a GPU; on a CPU: no, bf16")
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"WORLD_SIZE={given!r} is no number of processes")
    try:
        # Without cpu=True every process of torchrun would be a rank 0 of its own.
        accelerator = Accelerator(cpu=not has_device, mixed_precision=mixed_precision)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot start process of {given}: {one_line(error)}") from error
    if accelerator.num_processes != int(given):
        raise UserError(
            f"WORLD_SIZE is {given}, but {accelerator.num_processes} process was joined: each "
            "would train alone; launch with torchrun"
        )
    return accelerator


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds a part of the weights on each process.

    accelerate's distributed_type does not tell: its state takes back MULTI_GPU.
    """
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def agree(accelerator: Accelerator, error: UserError | None) -> None:
    """Raise on every process where one has an error; the main process tells it."""
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    lines: list[str | None] = gather_object([None if error is None else error.line])
    first = next((rank for rank, line in enumerate(lines) if line is not None), None)
    if first is None:
        return
    if accelerator.is_main_process:
        who = "" if first == 0 else f"process {first}: "
        raise UserError(f"{who}{lines[first]}") from error
    raise ReportedError(str(lines[first])) from error


def gathered(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    return values if accelerator.num_processes == 1 else gather_object(values)


def largest(values: torch.Tensor) -> list[float]:
    """Of each number over all processes."""
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values.tolist()


def is_of_the_network(error: Exception) -> bool:
    """Whether torch tells, in its words, that another process of the run is gone."""
    words = ("gloo", "nccl", "connection", "peer", "socket", "timed out")
    return any(word in str(error).lower() for word in words)


class Signals:
    """Notes SIGTERM and SIGUSR1 inside a `with`, for the loop to end where it can be saved.

    A library's caller outside the main thread keeps its own handlers.
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def find_device(name: str) -> torch.device:
    """auto (a GPU where there is one), cpu or cuda.

    Raises:
        UserError: for a GPU that is not there.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device cuda: torch finds no GPU; auto and cpu are accepted here")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
