"""How long a call takes on this GPU and what it needs; without one, on this CPU."""

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from results import FAILED, OK, OUT_OF_MEMORY
from torch.profiler import ProfilerActivity, profile

from metala_vision.errors import one_line

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
ROOT = Path(__file__).resolve().parents[1]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call, on a GPU with the cache cold: for operators."""
    if GPU:
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=200, return_mode="median"))
    return in_turn([call], 5)[0]


def in_turn(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each on a CPU, one after the other, after two rounds to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 2):
        for call, column in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if i >= 2:
                column.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(column) for column in times]


def step_milliseconds(call: Callable[[], object], seconds: float = 2.0) -> float:
    """Median time of a call among calls that follow each other: for steps of whole models.

    At least 5 and at most 200 of them, for about so many seconds, after three more.
    """
    for _ in range(3):
        call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    count = max(5, min(200, round(seconds / (time.perf_counter() - start))))
    if not GPU:
        return in_turn([call], count)[0]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def held_bytes() -> int:
    """Of the GPU's memory, by tensors that are alive."""
    return torch.cuda.memory_allocated() if GPU else 0


def peak_mebibytes(call: Callable[[], object], before: int | None = None) -> float | None:
    """Memory that a call takes at its fullest, above what was held before.

    Args:
        before: bytes; None for what is held as the call begins.
    """
    if not GPU:
        return None
    call()  # the first one may tune itself, in memory of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = held_bytes() if before is None else before
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def trace(call: Callable[[], object]) -> list[dict]:
    """The profiler's events of one call, as in a file for Chrome: times in microseconds."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def kernels_of(call: Callable[[], object]) -> tuple[int | None, float | None]:
    """Kernels that one call launches on the GPU, and the milliseconds that they run in all.

    None where there is no GPU, or a profiler that may not look at it.
    """
    found = [e["dur"] for e in trace(call) if e.get("cat") == "kernel"] if GPU else []
    return (len(found), 1e-3 * sum(found)) if found else (None, None)


def cold_kernels_ms(call: Callable[[], object]) -> float | None:
    """The milliseconds that a call's kernels run in all, with the cache cold: median of three."""
    if not GPU:
        return None
    large = torch.empty(2**26, dtype=torch.float32, device=DEVICE)
    found = []
    for _ in range(3):
        events = [e for e in trace(lambda: (large.fill_(1.0), call())) if e.get("cat") == "kernel"]
        events.sort(key=lambda event: event["ts"])
        found.append(1e-3 * sum(event["dur"] for event in events[1:]))  # behind the filling
    return statistics.median(found) or None


def figures(call: Callable[[], object]) -> dict:
    """What an operator needs, as fields of a row; its status alone where that cannot be measured.

    ms is what one waits for, gpu_ms its kernels alone: at small sizes the launches take longer.
    Both are with the cache cold.
    """
    try:
        peak = peak_mebibytes(call)
        ms = milliseconds(call)
        return {"status": OK, "ms": ms, "gpu_ms": cold_kernels_ms(call), "peak_mib": peak}
    except torch.OutOfMemoryError:
        return {"status": OUT_OF_MEMORY}
    except Exception as error:  # a compiler's, of others' kernels too: the next row may do
        synchronize()  # where the device is lost, so is the process
        return {"status": failure(error)}


def failure(error: Exception) -> str:
    """The status of a row that could not be measured."""
    return f"{FAILED}: {type(error).__name__}: {one_line(error)[:200]}"


def bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    x = torch.empty(2**28 if GPU else 2**22, dtype=torch.float32, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (1e-3 * milliseconds(lambda: y.copy_(x)))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "timm", "flash-linear-attention"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def commit() -> str:
    """By git, or METALA_VISION_COMMIT where the sources lie without it."""
    found = os.environ.get("METALA_VISION_COMMIT", "")
    if not found and shutil.which("git"):
        line = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
        found = done.stdout.strip()
    return found or "unknown"


def sources() -> str:
    """A digest of the code that is measured, and measures."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "kernels", "metala_vision"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def header(what: str) -> dict:
    """What a result's file says of where its rows come from."""
    cpu = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} of them used"
    return {
        "what": what, "device": torch.cuda.get_device_name() if GPU else cpu, "gpu": GPU,
        "dtype": str(DTYPE).removeprefix("torch."), "versions": versions(), "commit": commit(),
        "sources": sources(),
    }  # fmt: skip


def headline(result: dict) -> str:
    """The same in one line."""
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['what']}: {result['device']}, {found}, commit {result['commit']}"
