"""Training steps and inference of whole models on this GPU, beside timm's DeiT.

    python benchmarks/models.py run --out models.json [--minutes M] [--sizes PIXELS ...]
        [--models NAME ...] [--peer NAME=FILE.py:FUNCTION ...]
    python benchmarks/models.py show models.json [--plot models.png]

A training step is forward, loss, backward and a step of fused AdamW, under autocast to bfloat16,
in float32 on a CPU; DeiT is timm's with PyTorch's scaled_dot_product_attention. A row has

images_s  images a second, from the median time of steps that follow each other
peak_mib  memory at the fullest point of a step: weights, optimizer, images and all
kernels   launched in a step; gpu_ms: how long they run in all
batch     by size, halved until a step fits

Each model that is compiled for a size, and each that is not, has a process of its own, and the GPU
to itself; compiled ones are compiled ahead, several at once, into torch's cache. Rows come in the
order of importance until the minutes are over; what is left is "not run", and the next run with the
same --out does that. What the processes say lies beside the file, in the folder of its name. A peer
is a model of others that is not in this repository: FUNCTION(img_size) gives it; peer_models.py has
adaptors for ViG, Vim and fla-zoo.
"""

import argparse
import contextlib
import gc
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pictures
import timm
import torch
import torch.nn.functional as F
from gpu_timing import (
    DEVICE,
    GPU,
    failure,
    header,
    headline,
    held_bytes,
    kernels_of,
    peak_mebibytes,
    step_milliseconds,
    synchronize,
)
from jobs import KEYS, Job, Runner, plan
from peers import peer
from results import (
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    Budget,
    begin,
    command,
    find,
    put,
    run_and_show,
    save,
    shown,
    stopped,
)
from subjects import BATCHES, COMPARATORS, DEIT, OURS, SMALL, TRAINING
from torch import Tensor, nn

from metala_vision.errors import UserError

if not GPU:  # small ones, to show that it works
    BATCHES = {32: 2, 64: 1}


def batch_of(size: int) -> int:
    """Of a size that is not listed: as many tokens as 256 images of 224 pixels have."""
    return BATCHES.get(size) or max(1, (256 if GPU else 2) * 224**2 // size**2)


def build(name: str, size: int, peers: dict[str, Callable[[int], nn.Module]]) -> nn.Module:
    torch.manual_seed(0)
    model = peers[name](size) if name in peers else timm.create_model(name, img_size=size)
    if name.startswith("deit") and not all(block.attn.fused_attn for block in model.blocks):
        raise UserError("timm's fused attention is off; unset TIMM_FUSED_ATTN")
    return model.to(DEVICE)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def training_step(
    model: nn.Module, forward: Callable, x: Tensor, loss_of: Callable = cross_entropy
) -> Callable[..., None]:
    """A call that trains a step on these images; given `phase`, each within phase(its name)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    target = torch.arange(len(x), device=x.device) % 10

    def step(phase: Callable[[str], Any] = contextlib.nullcontext) -> None:
        with phase("forward"), torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = loss_of(forward(x), target)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def inference(forward: Callable, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            forward(x)

    return call


def is_full(error: RuntimeError) -> bool:
    """Whether it says that the device's memory is full, itself or a compiler for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def fitting(attempt: Callable[[int], dict], batch: int) -> dict:
    """attempt(batch) with the largest of batch, batch // 2, ... 1 that memory holds."""
    while True:
        try:
            return {"batch": batch, "status": OK, **attempt(batch)}
        except RuntimeError as error:
            if not is_full(error):
                raise
        torch._dynamo.reset()  # what it compiled for this batch
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
        if batch == 1:
            return {"batch": 1, "status": OUT_OF_MEMORY}
        batch //= 2


def measure(
    row: dict, batch: int, make: Callable[[], nn.Module], only_compile: bool = False
) -> dict:
    """The rest of a row."""
    training = row["what"] == TRAINING

    def attempt(batch: int) -> dict:
        before = held_bytes()  # a compiler may keep what the row before has held
        model = make().train(training)
        forward = torch.compile(model, dynamic=False) if row["compiled"] else model
        x = torch.randn(batch, 3, row["size"], row["size"], device=DEVICE)
        call = training_step(model, forward, x) if training else inference(forward, x)
        start = time.perf_counter()
        call()
        synchronize()
        first = time.perf_counter() - start
        if only_compile:
            return {}
        ms = step_milliseconds(call)
        kernels, gpu_ms = kernels_of(call)
        return {
            "ms": ms, "images_s": 1e3 * batch / ms, "peak_mib": peak_mebibytes(call, before),
            "kernels": kernels, "gpu_ms": gpu_ms, "first_s": first,
        }  # fmt: skip

    try:
        if only_compile:  # what does not fit beside other processes is compiled by then
            return attempt(batch)
        return fitting(attempt, batch)
    except UserError:
        raise
    except Exception as error:  # a compiler's, or a peer's: the next row may do
        synchronize()  # where the device is lost, so is the process
        return {"status": failure(error)}


def child(arguments: argparse.Namespace) -> None:
    """The rows of one job, each as a line of JSON as soon as it is there."""
    job = Job(arguments.child, tuple(arguments.sizes), arguments.compiled)
    peers = dict(peer(text) for text in arguments.peer)
    if arguments.only_compile:
        # A kernel's launch is chosen by timing it, which is no good beside other processes: the
        # choice is left to the process that measures.
        from torch._inductor import config

        config.autotune_local_cache = False
    for row in job.rows():
        size = row["size"]

        def make(size: int = size) -> nn.Module:
            return build(job.model, size, peers)

        row |= measure(row, batch_of(size), make, arguments.only_compile)
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        torch._dynamo.reset()
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def run(arguments: argparse.Namespace) -> None:
    peers = [text.partition("=")[0] for text in arguments.peer]
    for text in arguments.peer:
        peer(text)
    out, budget = arguments.out, Budget(arguments.minutes)
    result = begin(out, header("models"), arguments.retry)
    jobs = plan(arguments.models, peers, arguments.sizes, arguments.ways)
    for job in jobs:
        for row in job.rows():
            if not any(all(old[k] == row[k] for k in KEYS) for old in result["rows"]):
                put(result, {**row, "status": NOT_RUN}, KEYS)
    save(out, result)

    def missing(job: Job) -> Job:
        """The job with the sizes of which a row is missing."""
        waiting = [[row[k] for k in KEYS] for row in result["rows"] if row["status"] == NOT_RUN]
        sizes = {row["size"] for row in job.rows() if [row[k] for k in KEYS] in waiting}
        return job._replace(sizes=tuple(size for size in job.sizes if size in sizes))

    runner = Runner(arguments.peer, arguments.limit, out.with_suffix(""))
    for i, job in enumerate(jobs):
        waits = job.compiled and job not in runner.compiled and missing(job).sizes
        if waits and arguments.workers > 1 and budget.fits("compile ahead"):
            with budget.spending("compile ahead"):
                ahead = [j for j in jobs[i:] if j.compiled and missing(j).sizes]
                runner.compile_ahead(ahead[: arguments.workers], budget.left() / 2)
        kind = "compiled" if job.compiled else "eager"
        # A process that dies leaves the sizes behind the one in which it did.
        while (left := missing(job)).sizes and budget.fits(kind):
            with budget.spending(kind):
                rows = runner.rows(left, budget.left())
            for row in rows:
                if row["status"] == NOT_RUN:
                    row |= stopped(find(result["rows"], **{key: row[key] for key in KEYS}))
                put(result, row, KEYS)
                print(line(row), flush=True)
            save(out, result)
            if runner.told is not None:
                raise runner.told
            if rows[-1]["status"] == NOT_RUN:  # the time is over
                break
    show(result)


def line(row: dict) -> str:
    """A row as text."""
    name = f"{row['model']:24}{row['size']:5} px  {'compiled' if row['compiled'] else 'eager':9}"
    name += f"{row['what']:14}"
    if row["status"] != OK:
        return name + row["status"]
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    kernels = "-" if row["kernels"] is None else row["kernels"]
    return (
        f"{name}batch {row['batch']:4}{row['ms']:10.2f} ms{row['images_s']:10.1f} img/s"
        f"{peak:>8} MiB{kernels:>6} kernels"
    )


def show(result: dict) -> None:
    """Rows by size, beside DeiT where it was measured in the same way."""
    print(headline(result))
    for row in sorted(
        result["rows"], key=lambda r: (r["what"], r["size"], not r["compiled"], r["model"])
    ):
        print(line(row))


def parse() -> argparse.Namespace:
    parser, measured = run_and_show(__doc__)
    measured.add_argument("--sizes", type=int, nargs="+", default=list(BATCHES), metavar="PIXELS")
    default = [OURS, DEIT, *SMALL, *COMPARATORS] if GPU else [OURS, DEIT]
    measured.add_argument("--models", nargs="+", default=default, metavar="NAME")
    measured.add_argument("--peer", action="append", default=[], metavar="NAME=FILE.py:FUNCTION")
    ways = measured.add_mutually_exclusive_group()
    ways.add_argument("--eager", dest="ways", action="store_const", const=[False], help="alone")
    ways.add_argument("--compiled", action="store_true", help="alone")
    measured.add_argument("--limit", type=float, default=240, help="seconds of a model and size")
    cores = os.cpu_count() or 1
    measured.add_argument(
        "--workers", type=int, default=max(1, min(4, cores // 4)), help="compile at once"
    )
    measured.add_argument("--child", help=argparse.SUPPRESS)
    measured.add_argument("--only-compile", action="store_true", help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    if arguments.command == "run":
        if arguments.compiled:
            arguments.ways = [True]
        arguments.ways = arguments.ways or ([True, False] if GPU else [False])
        for size in arguments.sizes:
            if size < 16 or size % 16:
                raise UserError(f"--sizes must be multiples of 16, got {size}")
        for name in () if arguments.child else arguments.models:
            if not timm.is_model(name):
                raise UserError(f"--models {name!r} is no model of timm or metala_vision")
        if arguments.workers < 1 or not arguments.limit > 0:
            raise UserError(
                f"--workers must be >= 1 and --limit > 0, got --workers {arguments.workers} "
                f"--limit {arguments.limit}"
            )
    return arguments


def main() -> None:
    arguments = parse()
    if shown(arguments, show, pictures.models):
        return
    if arguments.child:
        child(arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    command(main)
