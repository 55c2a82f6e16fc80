"""A training step of metala_tiny by part, as a picture.

    python benchmarks/step.py run --out step.json [--batch B] [--size PIXELS] [--no-compile]
    python benchmarks/step.py show step.json [--plot step.png]

Eager forward, backward and optimizer by part of the model; compiled, where parts are fused with
each other, by kind of kernel. The times are those of the profiler: on a GPU of kernels, on a CPU of
operations without those that they call.

How time finds its part: each part runs in a range of its own, named after it. Each node of the
graph that autograd makes in a part is found when the part returns, from its outputs back to its
inputs, and opens the same range when the backward pass comes to it. A kernel belongs to the
innermost range in which the thread that launched it was; outside of all it is "everything else":
residuals, pooling, sums of gradients. So every kernel is in exactly one part, and the parts add up
to all of them. What a phase takes beyond its kernels, in steps without profiler and ranges, is
idle. `block.py` counts what the parts of a block need at least.
"""

import argparse
import contextlib
import re
import statistics
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pictures
import torch
from gpu_timing import DEVICE, GPU, header, headline, synchronize, trace
from models import build, cross_entropy, training_step
from results import OK, begin, command, put, run_and_show, save, shown
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves

import metala_vision.layers.metala as metala
from metala_vision.errors import UserError

PHASES = ("forward", "backward", "optimizer")
PART, PHASE, ELSE = "part: ", "phase: ", "everything else"
ENGINE = "autograd::engine::"
STEPS = 3  # in one trace
# Kinds of kernel, the first that fits; Inductor names a fused kernel after all that is in it.
KINDS = {
    "fused, with sums": r"^triton_(red|per|mix)_",
    "fused, elementwise": r"^triton_(poi|for|unk)_",
    "operator": r"gated_linear_attention|linear_recurrence|selective_scan",
    "norm and gate, one kernel": r"gated_norm",
    "convolution and SiLU, one kernel": r"depthwise_conv_(fwd|bwd)_kernel",
    "optimizer": r"multi_tensor|adam",
    "convolutions": r"conv|wgrad|dgrad|fprop|nchwToNhwc|nhwcToNchw",
    "softmax attention": r"flash|fmha|attention",
    "products": r"gemm|nvjet|cutlass|splitk|^triton_tem_|::mm$|::addmm$|::bmm$",
    "copies and fills": r"mem(cpy|set)|copy|fill",
}


class Labels:
    """Runs parts of a model so that a trace shows what belongs to them, forward and backward."""

    def call(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        with record_function(PART + name):
            out = function(*args, **kwargs)
        known = {x.grad_fn for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        waiting = [x.grad_fn for x in tree_leaves(out) if isinstance(x, Tensor)]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in known and "AccumulateGrad" not in node.name():
                known.add(node)
                self._open_in_backward(node, name)
                waiting += [other for other, _ in node.next_functions]
        return out

    def _open_in_backward(self, node: Any, name: str) -> None:
        opened = []

        def enter(*_: object) -> None:
            opened.append(record_function(PART + name))
            opened[-1].__enter__()

        def leave(*_: object) -> None:
            opened.pop().__exit__(None, None, None)

        node.register_prehook(enter)
        node.register_hook(leave)

    def module(self, name: str, module: nn.Module) -> None:
        inner = module.forward
        module.forward = lambda *args, **kwargs: self.call(name, inner, *args, **kwargs)

    @contextlib.contextmanager
    def model(self, model: Any) -> Iterator[None]:
        """The parts of a MetaLA backbone."""
        self.module("patch embedding", model.patch_embed)
        self.module("norms", model.norm)
        self.module("head and loss", model.head)
        for block in model.blocks:
            for norm in (block.norm1, block.norm2):
                self.module("norms", norm)
            self.module("GLU", block.mlp)
            self.module("convolution", block.mixer.conv)
            self.module("projections", block.mixer.in_proj)
            self.module("projections", block.mixer.out_proj)
        with contextlib.ExitStack() as stack:
            for name, function in (
                ("operator", "gated_linear_attention_op"), ("norm and gate", "gated_norm_op"),
            ):  # fmt: skip
                inner = getattr(metala, function)

                def labelled(*args, name=name, inner=inner, **kwargs):
                    return self.call(name, inner, *args, **kwargs)

                stack.enter_context(mock.patch.object(metala, function, labelled))
            yield


def _ranges(events: list[dict], prefix: str) -> list[dict]:
    return [
        event
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(prefix)
    ]


def _innermost(ranges: list[dict]) -> Callable[[float], str | None]:
    """The name of the shortest of nested ranges around a time."""
    ranges = sorted(ranges, key=lambda r: (r["ts"], -r["dur"]))
    starts = [r["ts"] for r in ranges]
    above: list[int] = []  # of each range, the one it lies in
    stack: list[int] = []
    for i, r in enumerate(ranges):
        while stack and ranges[stack[-1]]["ts"] + ranges[stack[-1]]["dur"] <= r["ts"]:
            stack.pop()
        above.append(stack[-1] if stack else -1)
        stack.append(i)

    def find(ts: float) -> str | None:
        i = bisect_right(starts, ts) - 1
        while i >= 0 and ranges[i]["ts"] + ranges[i]["dur"] <= ts:
            i = above[i]
        return ranges[i]["name"] if i >= 0 else None

    return find


def kernels(events: list[dict]) -> list[tuple[str, float, Any, float]]:
    """Name, milliseconds, and the thread and time of the launch, of each kernel, copy and fill."""
    launches = {
        event["args"]["correlation"]: (event["tid"], event["ts"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and "correlation" in event.get("args", {})
    }
    found = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            thread, ts = launches.get(event["args"].get("correlation"), (None, event["ts"]))
            found.append((event["name"], 1e-3 * event["dur"], thread, ts))
    return found


def operations(events: list[dict]) -> list[tuple[str, float, Any, float]]:
    """The same of each operation on the CPU, without the time of those that it calls.

    What autograd's engine does between two operations, in which our ranges are opened, is none.
    """
    found = []
    ops = [event for event in events if event.get("cat") == "cpu_op" and event.get("ph") == "X"]
    threads = defaultdict(list)
    for op in sorted(ops, key=lambda op: (op["ts"], -op["dur"])):
        threads[op["tid"]].append([op, op["dur"]])
    for column in threads.values():
        stack: list[list] = []
        for entry in column:
            while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= entry[0]["ts"]:
                stack.pop()
            if stack:
                stack[-1][1] -= entry[0]["dur"]
            stack.append(entry)
        found += [
            (op["name"], 1e-3 * own, op["tid"], op["ts"])
            for op, own in column
            if not op["name"].startswith(ENGINE)
        ]
    return found


def placed(
    events: list[dict], work: list[tuple[str, float, Any, float]]
) -> Iterator[tuple[str, str, str, float]]:
    """Phase, part, name and milliseconds of each piece of work; what is in no phase is left out.

    The backward pass may run in another thread than the phase that waits for it.
    """
    phase_of = _innermost(_ranges(events, PHASE))
    threads = defaultdict(list)
    for event in _ranges(events, PART):
        threads[event["tid"]].append(event)
    part_of = {thread: _innermost(ranges) for thread, ranges in threads.items()}
    # Of a launch in a thread that the profiler has another number for: one of them works at a time.
    anywhere = _innermost(_ranges(events, PART))
    for name, ms, thread, ts in work:
        phase = (phase_of(ts) or PHASE).removeprefix(PHASE)
        part = part_of.get(thread, anywhere)(ts)
        if phase == "optimizer":
            yield phase, "optimizer", name, ms
        elif phase:
            yield phase, (part or PART + ELSE).removeprefix(PART), name, ms


def attribute(
    events: list[dict], work: list[tuple[str, float, Any, float]], by_kind: bool
) -> dict[str, dict[str, float]]:
    """Milliseconds of a trace: {phase: {part or kind: ms}}."""
    found: dict[str, dict[str, float]] = {phase: defaultdict(float) for phase in PHASES}
    for phase, part, name, ms in placed(events, work):
        found[phase][kind(name) if by_kind else part] += ms
    return found


def kind(name: str) -> str:
    matching = (k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(matching, "other kernels")


def labelled_step(model: nn.Module, x: Tensor, labels: Labels) -> Callable[..., None]:
    """A training step whose loss is in the head's part."""
    return training_step(model, model, x, partial(labels.call, "head and loss", cross_entropy))


def phase_times(call: Callable, repeats: int) -> dict[str, float]:
    """Median milliseconds of each phase, in steps that follow each other, without a profiler."""
    times: dict[str, list] = defaultdict(list)

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        if GPU:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            yield
            marks[1].record()
            times[name].append(marks)
        else:
            start = time.perf_counter()
            yield
            times[name].append(1e3 * (time.perf_counter() - start))

    for _ in range(repeats):
        call(timed)
    synchronize()
    return {
        name: statistics.median(m[0].elapsed_time(m[1]) if GPU else m for m in column)
        for name, column in times.items()
    }


def rows(name: str, size: int, batch: int, compiled: bool) -> list[dict]:
    """One row for each phase."""
    model = build(name, size, {})
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    forward = torch.compile(model, dynamic=False) if compiled else model
    plain = training_step(model, forward, x)
    for _ in range(3):
        plain()
    whole = phase_times(plain, 10)

    def marked(call: Callable) -> None:
        for _ in range(STEPS):
            call(lambda phase: record_function(PHASE + phase))

    if compiled:
        events = trace(lambda: marked(plain))
    else:
        labels = Labels()
        with labels.model(model):
            ranged = labelled_step(model, x, labels)
            ranged()
            events = trace(lambda: marked(ranged))
    work = kernels(events) if GPU else operations(events)
    if not work:
        raise UserError("the profiler saw no kernel: it may not look at this GPU (CUPTI)")
    found = attribute(events, work, compiled)
    if not GPU:  # operations are slower under the profiler: compared with their own whole
        whole = dict.fromkeys(PHASES, 0.0)
        for event in _ranges(events, PHASE):
            whole[event["name"].removeprefix(PHASE)] += 1e-3 * event["dur"] / STEPS
    longest: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel, ms, _, _ in work:
        longest[kernel][0] += ms / STEPS
        longest[kernel][1] += 1 / STEPS
    top = sorted(longest.items(), key=lambda item: -item[1][0])[:25]
    result = []
    for phase in PHASES:
        parts = {part: ms / STEPS for part, ms in found[phase].items()}
        parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
        idle = max(0.0, whole[phase] - sum(parts.values()))
        way = "compiled" if compiled else "eager"
        row = {"phase": f"{way} {phase}", "status": OK, "ms": whole[phase], "idle": idle}
        result.append({**row, "parts": parts})
    result[0]["longest"] = [{"kernel": k[:200], "ms": ms, "count": n} for k, (ms, n) in top]
    return result


def run(arguments: argparse.Namespace) -> None:
    fields = {"model": arguments.model, "batch": arguments.batch, "size": arguments.size}
    result = begin(arguments.out, {**header("step"), **fields}, arguments.retry)
    if any(result[key] != value for key, value in fields.items()):
        raise UserError(f"{arguments.out} is of other settings; choose another --out")
    for compiled in (False,) if arguments.no_compile else (False, True):
        phase = "compiled forward" if compiled else "eager forward"
        if not any(row["phase"] == phase for row in result["rows"]):
            for row in rows(arguments.model, arguments.size, arguments.batch, compiled):
                put(result, row, ("phase",))
            save(arguments.out, result)
    show(result)


def show(result: dict) -> None:
    print(f"{headline(result)}: {result['model']}, batch {result['batch']}, {result['size']} px")
    for row in result["rows"]:
        print(f"{row['phase']:20}{row['ms']:9.2f} ms, idle {row['idle']:.2f}")
        for part, ms in row["parts"].items():
            print(f"    {part:28}{ms:9.3f} ms {100 * ms / row['ms']:5.1f} %")


def main() -> None:
    parser, measured = run_and_show(__doc__)
    measured.add_argument("--model", default="metala_tiny", help="one of the metala_* models")
    measured.add_argument("--batch", type=int, default=256 if GPU else 2)
    measured.add_argument("--size", type=int, default=224 if GPU else 64)
    measured.add_argument("--no-compile", action="store_true", help="eager alone")
    arguments = parser.parse_args()
    if shown(arguments, show, pictures.step):
        return
    if arguments.batch < 1 or arguments.size < 16 or arguments.size % 16:
        raise UserError(
            "--batch must be >= 1 and --size a multiple of 16, "
            f"got --batch {arguments.batch} --size {arguments.size}"
        )
    if not arguments.model.startswith("metala_"):
        raise UserError(f"--model must be one of the metala_* models, got {arguments.model!r}")
    run(arguments)


if __name__ == "__main__":
    command(main)
