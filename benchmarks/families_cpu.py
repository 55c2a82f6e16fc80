"""Every family's tiny model and timm's deit_tiny_patch16_224 on this CPU, in one run.

    python benchmarks/families_cpu.py [--repeats R] [--out FILE.json]

Images a second at inference, eager, at 224 and 512 pixels, the models in turn in one process; and
the peak memory of a training step, each in a process of its own. Ratios to DeiT are the figures to
quote; times belong to this machine at this moment.
"""

import argparse
import platform
from pathlib import Path

import torch
from gpu_timing import header, in_turn
from models_cpu import build, peak_memory
from results import command, save
from subjects import DEIT

import metala_vision
from metala_vision.errors import UserError
from metala_vision.files import check_outputs
from metala_vision.models import FAMILIES

MODELS = (DEIT, *(f"{family}_tiny" for family in FAMILIES))
BATCHES = {224: 8, 512: 2}  # inference
MEMORY_BATCHES = {224: 16, 512: 4}  # training step


def throughput(size: int, repeats: int) -> list[float]:
    """Images a second of each model."""
    x = torch.randn(BATCHES[size], 3, size, size)
    models = [build(name, size).eval() for name in MODELS]
    with torch.no_grad():
        times = in_turn([lambda model=model: model(x) for model in models], repeats)
    return [1e3 * len(x) / ms for ms in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        raise UserError(f"--repeats must be >= 1, got {arguments.repeats}")
    check_outputs({"--out": arguments.out})

    print(
        f"metala_vision {metala_vision.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    speeds = {size: throughput(size, arguments.repeats) for size in BATCHES}
    memory = {
        size: [peak_memory(name, batch, size) for name in MODELS]
        for size, batch in MEMORY_BATCHES.items()
    }
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
