"""A model at one size, measured in a process of its own: `python -m metala_vision.scaling.point`.

The argument is a Point as JSON; the last line printed is what was found, as JSON. The process ends
with the command that started it and at its time limit, and is the first that the kernel kills where
memory is short.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metala_vision.children import end_with_parent

FEWEST, MOST = 3, 200  # timed passes
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
# As torch, its libraries and the linker put it, in lower case.
FULL = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory",
    "bad_alloc", "bad allocation", "memoryerror",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What is measured. limit in seconds of its process; memory_limit in GiB."""

    model: str
    size: int
    mode: str
    batch_size: int = 1
    patch_size: int | None = None
    mixed_precision: str = "no"
    seconds: float = 2.0
    limit: float = 300.0
    memory_limit: float | None = None
    allocator: str = "keep"


def is_full(text: str) -> bool:
    """Whether an error's text says that memory is short."""
    return any(words in text.lower() for words in FULL)


def libc() -> Any:
    """The C library's functions, where they can be called."""
    return ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed instead of giving it back to the system.

    Given back, every pass faults its pages in anew, or does not, by the heap's layout at that size.
    Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc().mallopt(M_MMAP_MAX, 0)
        libc().mallopt(M_TRIM_THRESHOLD, -1)


def own_status(key: str) -> int:
    """Bytes of this process, as Linux counts them: VmRSS now, VmHWM at its peak, VmData; else 0."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return 0


def available_bytes() -> int | None:
    """Physical memory that can be had without swapping, where the system tells (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def limit_memory(gib: float | None) -> None:
    """Refuse this process more than that beyond what it has; None is what is available.

    By RLIMIT_DATA: private memory that can be written, which is what allocations take; of the
    address space (RLIMIT_AS) threads reserve more than they use.
    """
    more = available_bytes() if gib is None else int(gib * 2**30)
    if more is not None and own_status("VmData"):
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = own_status("VmData") + more
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def lift_memory_limit() -> None:
    """Back to what this process was started with."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def waited() -> float:
    """Seconds in which this thread could have run and another had the core (Linux), so far."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def pass_seconds(
    step: Callable[[], object], seconds: float, deadline: float, before: float
) -> list[tuple[float, float]]:
    """Seconds of each timed pass, and how many of them another process had the core.

    Before them passes warm up for a quarter of `seconds`.
    At least FEWEST passes, or as many as there are before `deadline` (of time.monotonic), but one;
    where the pass before took `seconds` alone, it was warm-up enough.
    """
    start = time.perf_counter()
    while before < seconds and time.perf_counter() - start < seconds / 4:
        step()
    passes: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(passes) < MOST:
        enough = len(passes) >= FEWEST and time.perf_counter() - start >= seconds
        late = bool(passes) and time.monotonic() + 1.5 * max(passes)[0] > deadline
        if enough or late:
            break
        begun, lost = time.perf_counter(), waited()
        step()
        passes.append((time.perf_counter() - begun, waited() - lost))
    return passes


def measure(point: Point, deadline: float) -> dict[str, Any]:
    """Times of passes in seconds a batch, and the MiB that a pass adds to weights and images.

    On a CPU, with one thread, the time in which it waited for a core is no part of a pass, but of
    "waited", which is all of it: on a busy machine it would be most of the noise. That other
    processes share caches and memory remains.
    """
    import torch

    from metala_vision.build import create_model
    from metala_vision.config import ModelConfig

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if not on_gpu:
        limit_memory(point.memory_limit)
    elif point.memory_limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, point.memory_limit * 2**30 / total))
    torch.manual_seed(0)
    config = ModelConfig(model=point.model, img_size=point.size, patch_size=point.patch_size)
    model = create_model(config, 1000).to(device).train(point.mode == "train")
    images = torch.randn(point.batch_size, 3, point.size, point.size, device=device)
    classes = torch.zeros(point.batch_size, dtype=torch.long, device=device)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(point.mixed_precision)

    def forward() -> Any:
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            return model(images)

    def step() -> None:
        if point.mode == "train":
            model.zero_grad()
            torch.nn.functional.cross_entropy(forward().float(), classes).backward()
        else:
            with torch.inference_mode():
                forward()
        if on_gpu:
            torch.cuda.synchronize(device)

    step()  # loads code and makes what stays; of a small model that is more than its activations
    model.zero_grad()
    memory = _Peak(device)
    start = time.perf_counter()
    step()
    second, memory_mib = time.perf_counter() - start, memory.mib()
    if not on_gpu:
        lift_memory_limit()  # it fits; what the allocator keeps from here on needs room
        if point.allocator == "keep":
            keep_freed_memory()
    passes = pass_seconds(step, point.seconds, deadline, second)
    if on_gpu or torch.get_num_threads() > 1:
        # The thread waits for its own helpers too, and what those wait is not counted.
        passes = [(wall, 0.0) for wall, _ in passes]
    return {
        "passes": [round(wall - lost, 9) for wall, lost in passes],
        "waited": round(sum(lost for _, lost in passes), 6),
        "memory_mib": round(memory_mib, 3),
    }


class _Peak:
    """The most memory since now, above what is held now."""

    def __init__(self, device: Any) -> None:
        import torch

        self.gpu = device if device.type == "cuda" else None
        if self.gpu is not None:
            torch.cuda.reset_peak_memory_stats(self.gpu)
            self.before = torch.cuda.memory_allocated(self.gpu)
            return
        with contextlib.suppress(OSError, AttributeError):
            libc().malloc_trim(0)  # what building the model has left would hide a part
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.before = own_status("VmRSS") or self._peak()

    def _peak(self) -> int:
        if self.gpu is not None:
            import torch

            return torch.cuda.max_memory_allocated(self.gpu)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return own_status("VmHWM") or most * (1 if sys.platform == "darwin" else 1024)

    def mib(self) -> float:
        return max(0, self._peak() - self.before) / 2**20


def main() -> int:
    """Measure the point that the argument names."""
    point = Point(**json.loads(sys.argv[1]))
    deadline = time.monotonic() + point.limit
    signal.setitimer(signal.ITIMER_REAL, point.limit)  # SIGALRM ends this process
    end_with_parent(signal.SIGKILL, os.getppid())
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        found = measure(point, deadline)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # any model's, told as the cell of the table
        lift_memory_limit()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        found = {"full": True} if is_full(text) else {"error": text.removeprefix("UserError: ")}
    print(json.dumps(found), flush=True)
    os._exit(0)  # what is left of a large process need not be torn down


if __name__ == "__main__":
    sys.exit(main())
