"""Training steps and inference of whole models on this GPU, beside timm's DeiT.

    python benchmarks/models.py run --out models.json [--minutes M] [--sizes PIXELS ...]
        [--models NAME ...] [--peer NAME=FILE.py:FUNCTION ...]
    python benchmarks/models.py show models.json [--plot models.png]

A training step is forward, loss, backward and a step of fused AdamW, under autocast to bfloat16,
in float32 on a CPU; DeiT is timm's with PyTorch's scaled_dot_product_attention. A row has

images_s  images a second, from the median time of steps that follow each other
peak_mib  memory at the fullest point of a step: weights, optimizer, images and all
kernels   launched in a step
batch     by size, halved until a step fits

Each model, size and way (compiled or not) has a process of its own, and the GPU to itself; compiled
ones are compiled ahead, several at once, into torch's cache. Rows come in the order of importance
until the minutes are over; what is left is "not run", and the next run with the same --out does
that. A peer is a model of others that is not in this repository: FUNCTION(img_size) gives it.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pictures
import timm
import torch
import torch.nn.functional as F
from gpu_timing import (
    DEVICE,
    GPU,
    header,
    headline,
    kernel_count,
    peak_mebibytes,
    step_milliseconds,
    synchronize,
)
from peers import peer
from results import (
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    Budget,
    begin,
    command,
    end_group,
    last_line,
    limited,
    put,
    run_and_show,
    save,
    shown,
)
from torch import nn

from metala_vision.errors import UserError
from metala_vision.models import FAMILIES

TRAINING, INFERENCE = "training step", "inference"
OURS, DEIT = "metala_tiny", "deit_tiny_patch16_224"
SMALL = ("metala_small", "deit_small_patch16_224")
COMPARATORS = tuple(f"{family}_tiny" for family in FAMILIES if family != "metala")
# About as many tokens in each; without a GPU small ones, to show that it works.
BATCHES = {224: 256, 512: 64, 1024: 16, 2048: 4} if GPU else {32: 2, 64: 1}
KEYS = ("model", "size", "compiled", "what")


class Job(NamedTuple):
    model: str
    size: int
    compiled: bool


def plan(models: list[str], peers: list[str], sizes: list[int], compiled: list[bool]) -> list[Job]:
    """Every job once, what the goals are about first."""

    def place(job: Job) -> tuple:
        model, size, compiled = job
        named = size in (224, 1024)
        if model in (OURS, DEIT):
            group = 0 if compiled and named else 1 if compiled else 4
        elif model in SMALL or model in peers:
            group = 2 if compiled and named else 5
        else:
            group = 3 if compiled and named else 6
        return group, not named, size, [*models, *peers].index(model)

    jobs = [Job(m, s, c) for m in (*models, *peers) for s in sizes for c in compiled]
    return sorted(jobs, key=place)


def batch_of(size: int) -> int:
    """Of a size that is not listed: as many tokens as 256 images of 224 pixels have."""
    return BATCHES.get(size) or max(1, (256 if GPU else 2) * 224**2 // size**2)


def build(name: str, size: int, peers: dict[str, Callable[[int], nn.Module]]) -> nn.Module:
    torch.manual_seed(0)
    model = peers[name](size) if name in peers else timm.create_model(name, img_size=size)
    if name.startswith("deit") and not all(block.attn.fused_attn for block in model.blocks):
        raise UserError("timm's fused attention is off; unset TIMM_FUSED_ATTN")
    return model.to(DEVICE)


def training_step(model: nn.Module, forward: Callable, x: torch.Tensor) -> Callable[[], object]:
    """A call that trains a step on these images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    labels = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            logits = forward(x)
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()

    return step


def inference(forward: Callable, x: torch.Tensor) -> Callable[[], object]:
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


def measure(job: Job, what: str, batch: int, make: Callable[[], nn.Module], only_compile: bool):
    """The row of one job."""

    def attempt(batch: int) -> dict:
        model = make().train(what == TRAINING)
        forward = torch.compile(model, dynamic=False) if job.compiled else model
        x = torch.randn(batch, 3, job.size, job.size, device=DEVICE)
        train = what == TRAINING
        call = training_step(model, forward, x) if train else inference(forward, x)
        start = time.perf_counter()
        call()
        synchronize()
        first = time.perf_counter() - start
        if only_compile:
            return {}
        ms = step_milliseconds(call)
        return {
            "ms": ms, "images_s": 1e3 * batch / ms, "peak_mib": peak_mebibytes(call, whole=True),
            "kernels": kernel_count(call), "first_s": first,
        }  # fmt: skip

    if only_compile:  # what does not fit beside other processes is compiled by then
        with contextlib.suppress(RuntimeError):
            attempt(batch)
        return {}
    return {**job._asdict(), "what": what, **fitting(attempt, batch)}


def child(arguments: argparse.Namespace) -> None:
    """The rows of one job, each as a line of JSON as soon as it is there."""
    job = Job(arguments.child, arguments.sizes[0], arguments.compiled)
    peers = dict(peer(text) for text in arguments.peer)
    if arguments.only_compile:
        # A kernel's launch is chosen by timing it, which is no good beside other processes: the
        # choice is left to the process that measures.
        from torch._inductor import config

        config.autotune_local_cache = False
    for what in (TRAINING, INFERENCE):
        row = measure(
            job, what, batch_of(job.size), lambda: build(job.model, job.size, peers),
            arguments.only_compile,
        )  # fmt: skip
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        torch._dynamo.reset()
        gc.collect()


class Runner:
    """Processes for jobs."""

    def __init__(self, peers: list[str], limit: float, folder: Path) -> None:
        self.peers, self.limit, self.folder = peers, limit, folder
        self.compiled: set[Job] = set()

    def _command(self, job: Job, out: Path, *more: str) -> list[str]:
        flags = [f for text in self.peers for f in ("--peer", text)]
        flags += ["--compiled"] if job.compiled else []
        return [
            sys.executable, __file__, "run", "--out", str(out), "--child", job.model,
            "--sizes", str(job.size), *flags, *more,
        ]  # fmt: skip

    def compile_ahead(self, jobs: list[Job], seconds: float) -> None:
        """These at once; one that fails or is too slow will show itself when it is measured."""
        started = []
        for job in jobs:
            self.compiled.add(job)
            command_line = self._command(job, self.folder / "ahead", "--only-compile")
            with (self.folder / f"ahead_{job.model}_{job.size}.txt").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        command_line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        last = time.monotonic() + min(seconds, self.limit)
        try:
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, last - time.monotonic()))
        finally:
            for process in started:
                end_group(process)

    def rows(self, job: Job, seconds: float) -> list[dict]:
        """A row for training and one for inference, whatever became of them."""
        out = self.folder / f"{job.model}_{job.size}_{job.compiled}.jsonl"
        log = out.with_suffix(".txt")
        out.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        status = limited(self._command(job, out), min(seconds, self.limit), log)
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        found = [json.loads(line) for line in lines]
        if status is not None:
            missing = f"failed: {last_line(log)}"
        else:
            missing = NOT_RUN if seconds < self.limit else f"stopped after {self.limit:.0f} s"
        for what in (TRAINING, INFERENCE)[len(found) :]:
            found.append({**job._asdict(), "what": what, "status": missing})
        return found


def run(arguments: argparse.Namespace) -> None:
    peers = [text.partition("=")[0] for text in arguments.peer]
    for text in arguments.peer:
        peer(text)
    out, budget = arguments.out, Budget(arguments.minutes)
    result = begin(out, header("models"))
    jobs = plan(arguments.models, peers, arguments.sizes, arguments.ways)
    for job in jobs:
        for what in (TRAINING, INFERENCE):
            row = {**job._asdict(), "what": what, "status": NOT_RUN}
            if not any(all(old[k] == row[k] for k in KEYS) for old in result["rows"]):
                put(result, row, KEYS)
    save(out, result)

    def missing(job: Job) -> bool:
        mine = [r for r in result["rows"] if all(r[k] == v for k, v in job._asdict().items())]
        again = (NOT_RUN, "failed", "stopped") if arguments.retry else NOT_RUN
        return any(row["status"].startswith(again) for row in mine)

    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(arguments.peer, arguments.limit, Path(folder))
        for i, job in enumerate(jobs):
            if not missing(job):
                continue
            if job.compiled and arguments.workers > 1 and job not in runner.compiled:
                if not budget.fits("compile ahead"):
                    continue
                with budget.spending("compile ahead"):
                    ahead = [j for j in jobs[i:] if j.compiled and missing(j)]
                    runner.compile_ahead(ahead[: arguments.workers], budget.left())
            kind = "compiled" if job.compiled else "eager"
            if not budget.fits(kind):
                continue
            with budget.spending(kind):
                for row in runner.rows(job, budget.left()):
                    put(result, row, KEYS)
                    print(line(row), flush=True)
            save(out, result)
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
    measured.add_argument("--minutes", type=float, default=1e4, help="to take at most")
    measured.add_argument("--sizes", type=int, nargs="+", default=list(BATCHES), metavar="PIXELS")
    default = [OURS, DEIT, *SMALL, *COMPARATORS] if GPU else [OURS, DEIT]
    measured.add_argument("--models", nargs="+", default=default, metavar="NAME")
    measured.add_argument("--peer", action="append", default=[], metavar="NAME=FILE.py:FUNCTION")
    ways = measured.add_mutually_exclusive_group()
    ways.add_argument("--eager", dest="ways", action="store_const", const=[False], help="alone")
    ways.add_argument("--compiled", action="store_true", help="alone")
    measured.add_argument("--limit", type=float, default=240, help="seconds of one process")
    measured.add_argument("--retry", action="store_true", help="also what failed or was stopped")
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
