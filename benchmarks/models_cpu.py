"""metala_tiny beside timm's deit_tiny_patch16_224 on this CPU.

    python benchmarks/models_cpu.py [--compile] [--out FILE.json]

Inference (batch 8 at 224 pixels, 1 at 1024) and a training step at 224, in turn in one process, and
the peak memory of a training step, each in a process of its own. DeiT's time over ours is the
figure to quote; times belong to this machine at this moment.
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import timm
import torch
from gpu_timing import header, in_turn
from results import command, save
from subjects import DEIT, INFERENCE, OURS, TRAINING
from torch import nn

import metala_vision
from metala_vision.errors import UserError
from metala_vision.files import check_outputs
from metala_vision.scaling.point import own_status

MODELS = (OURS, DEIT)
MEMORY_BATCH = 16


def build(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size)


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


def inference(batch: int, size: int, compiled: bool, repeats: int) -> dict:
    x = torch.randn(batch, 3, size, size)
    models = [build(name, size).eval() for name in MODELS]
    runs = [torch.compile(model) if compiled else model for model in models]
    with torch.no_grad():
        ours, deit = in_turn([lambda run=run: run(x) for run in runs], repeats)
    return {"what": INFERENCE, "batch": batch, "size": size, "ours_ms": ours, "deit_ms": deit}


def training(batch: int, size: int, compiled: bool, repeats: int) -> dict:
    x = torch.randn(batch, 3, size, size)
    models = [build(name, size).train() for name in MODELS]
    runs = [torch.compile(model) if compiled else model for model in models]
    ours, deit = in_turn([lambda run=run: step(run, x) for run in runs], repeats)
    return {"what": TRAINING, "batch": batch, "size": size, "ours_ms": ours, "deit_ms": deit}


def peak_memory(name: str, batch: int, size: int) -> float:
    """MiB that two training steps add to a process that has built the model (Linux)."""
    line = [sys.executable, __file__, "--memory-of", name, str(batch), str(size)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the memory of {name}: its process ended with {done.returncode}")
    return float(done.stdout)


def own_memory(name: str, batch: int, size: int) -> float:
    """The same, of this process."""
    model, x = build(name, size), torch.randn(batch, 3, size, size)
    before = own_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step(model, x), step(model, x)
    return (own_status("VmHWM") - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compiled, beside eager")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, batch, size = arguments.memory_of
        print(own_memory(name, int(batch), int(size)))
        return
    if arguments.repeats < 1:
        raise UserError(f"--repeats must be >= 1, got {arguments.repeats}")
    check_outputs({"--out": arguments.out})
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
            rows.append({**row, "compiled": compiled, "ratio": row["deit_ms"] / row["ours_ms"]})
            print(
                f"{'compiled' if compiled else 'eager':9} {row['what']:14} "
                f"B{row['batch']} {row['size']:5} px  ours {row['ours_ms']:8.1f} ms  "
                f"DeiT {row['deit_ms']:8.1f} ms  DeiT/ours {rows[-1]['ratio']:.2f}",
                flush=True,
            )
    memory = {name: peak_memory(name, MEMORY_BATCH, 224) for name in MODELS}
    ratio = memory[MODELS[0]] / memory[MODELS[1]]
    print(
        f"peak memory of a training step, batch {MEMORY_BATCH} at 224: "
        f"ours {memory[MODELS[0]]:.0f} MiB, DeiT {memory[MODELS[1]]:.0f} MiB, ratio {ratio:.2f}"
    )
    if arguments.out:
        save(arguments.out, {**header("models_cpu"), "memory_mib": memory, "rows": rows})


if __name__ == "__main__":
    command(main)
