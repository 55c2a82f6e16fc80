"""How long a call takes on this GPU and what it needs; without one, on this CPU."""

import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    if GPU:
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=200, return_mode="median"))
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_mebibytes(call: Callable[[], object]) -> float | None:
    """Memory that a call takes at its fullest, above what is there before it."""
    if not GPU:
        return None
    call()  # the first one may tune itself, in memory of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    x = torch.empty(2**28 if GPU else 2**22, dtype=torch.float32, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (1e-3 * milliseconds(lambda: y.copy_(x)))


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for package in ("triton", "timm", "flash-linear-attention"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
