"""metala_tiny beside timm's deit_tiny_patch16_224 on this CPU.

    python benchmarks/models_cpu.py [--compile] [--out FILE.json]

Inference (batch 8 at 224 pixels, 1 at 1024) and a training step at 224, in turn in one process, and
the peak memory of a training step, each in a process of its own. DeiT's time over ours is the
figure to quote; times belong to this machine at this moment.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

import metala_vision

MODELS = ("metala_tiny", "deit_tiny_patch16_224")
MEMORY_BATCH = 16


def build(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size)


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


def in_turn(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, called one after the other after two warm-up rounds."""
    times: list[list[float]] = [[] for _ in functions]
    for i in range(repeats + 2):
        for function, column in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if i >= 2:
                column.append(time.perf_counter() - start)
    return [statistics.median(column) for column in times]


def inference(batch: int, size: int, compiled: bool, repeats: int) -> dict:
    x = torch.randn(batch, 3, size, size)
    models = [build(name, size).eval() for name in MODELS]
    runs = [torch.compile(model) if compiled else model for model in models]
    with torch.no_grad():
        ours, deit = in_turn([lambda run=run: run(x) for run in runs], repeats)
    return {"what": "inference", "batch": batch, "size": size, "ours_s": ours, "deit_s": deit}


def training(batch: int, size: int, compiled: bool, repeats: int) -> dict:
    x = torch.randn(batch, 3, size, size)
    models = [build(name, size).train() for name in MODELS]
    runs = [torch.compile(model) if compiled else model for model in models]
    ours, deit = in_turn([lambda run=run: step(run, x) for run in runs], repeats)
    return {"what": "training step", "batch": batch, "size": size, "ours_s": ours, "deit_s": deit}


def status(key: str) -> float:
    """A figure of this process in MiB: VmRSS now, VmHWM at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def peak_memory(name: str) -> float:
    """MiB that two training steps add to a process that has built the model."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", name], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compiled, beside eager")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="also write the rows as JSON")
    parser.add_argument("--memory-of", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        model, x = build(arguments.memory_of, 224), torch.randn(MEMORY_BATCH, 3, 224, 224)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        step(model, x), step(model, x)
        print(status("VmHWM") - before)
        return

    print(
        f"metala_vision {metala_vision.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    rows = []
    for compiled in (False, True) if arguments.compile else (False,):
        for row in (
            inference(8, 224, compiled, arguments.repeats),
            inference(1, 1024, compiled, arguments.repeats),
            training(8, 224, compiled, arguments.repeats),
        ):
            rows.append({**row, "compiled": compiled, "ratio": row["deit_s"] / row["ours_s"]})
            print(
                f"{'compiled' if compiled else 'eager':9} {row['what']:14} "
                f"B{row['batch']} {row['size']:5} px  ours {1e3 * row['ours_s']:8.1f} ms  "
                f"DeiT {1e3 * row['deit_s']:8.1f} ms  DeiT/ours {rows[-1]['ratio']:.2f}",
                flush=True,
            )
    memory = {name: peak_memory(name) for name in MODELS}
    ratio = memory[MODELS[0]] / memory[MODELS[1]]
    print(
        f"peak memory of a training step, batch {MEMORY_BATCH} at 224: "
        f"ours {memory[MODELS[0]]:.0f} MiB, DeiT {memory[MODELS[1]]:.0f} MiB, ratio {ratio:.2f}"
    )
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(
                {"torch": torch.__version__, "rows": rows, "memory_mib": memory}, file, indent=2
            )


if __name__ == "__main__":
    main()
