"""Every family's tiny model and timm's deit_tiny_patch16_224 on this CPU, in one run.

    python benchmarks/families_cpu.py [--repeats R] [--out FILE.json]

Images a second at inference, eager, at 224 and 512 pixels, the models in turn in one process; and
the peak memory of a training step, each in a process of its own. Ratios to DeiT are the figures to
quote; times belong to this machine at this moment.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import torch
from gpu_timing import header
from models_cpu import build, in_turn, status, step
from results import command, save

import metala_vision
from metala_vision.models import FAMILIES

DEIT = "deit_tiny_patch16_224"
MODELS = (DEIT, *(f"{family}_tiny" for family in FAMILIES))
BATCHES = {224: 8, 512: 2}  # inference
MEMORY_BATCHES = {224: 16, 512: 4}  # training step


def throughput(size: int, repeats: int) -> list[float]:
    """Images a second of each model."""
    x = torch.randn(BATCHES[size], 3, size, size)
    models = [build(name, size).eval() for name in MODELS]
    with torch.no_grad():
        seconds = in_turn([lambda model=model: model(x) for model in models], repeats)
    return [len(x) / s for s in seconds]


def peak_memory(name: str, size: int) -> float:
    """MiB that two training steps add to a process that has built the model."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", name, str(size)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {arguments.repeats}")
    if arguments.memory_of:
        name, size = arguments.memory_of[0], int(arguments.memory_of[1])
        model, x = build(name, size), torch.randn(MEMORY_BATCHES[size], 3, size, size)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        step(model, x), step(model, x)
        print(status("VmHWM") - before)
        return

    print(
        f"metala_vision {metala_vision.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    speeds = {size: throughput(size, arguments.repeats) for size in BATCHES}
    memory = {size: [peak_memory(name, size) for name in MODELS] for size in BATCHES}
    rows = []
    print("| model | parameters | img/s 224 | to DeiT | MiB | img/s 512 | to DeiT | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for i, name in enumerate(MODELS):
        row = {"model": name, "parameters": sum(p.numel() for p in build(name, 224).parameters())}
        cells = [f"`{name}`", f"{row['parameters']:,}"]
        for size in BATCHES:
            speed, ratio = speeds[size][i], speeds[size][i] / speeds[size][0]
            row |= {f"images_s_{size}": speed, f"mib_{size}": memory[size][i]}
            cells += [f"{speed:.1f}", f"{ratio:.2f}", f"{memory[size][i]:.0f}"]
        rows.append(row)
        print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.out:
        save(arguments.out, {**header("families_cpu"), "rows": rows})


if __name__ == "__main__":
    command(main)
