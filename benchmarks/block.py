"""Where the time of a MetaLA block goes, part by part.

    python benchmarks/block.py [--batch B] [--size PIXELS] [--out FILE.json]

For each part of a block of metala_tiny:

launches  operations that write a tensor, as eager PyTorch calls them one by one
bytes     a token, that these operations read and write in bfloat16
floor     a token, if the part were one kernel: each input read once, each output written once
ms        forward, and forward with backward: medians, on this device

launches and bytes are counted, not measured: they are the same on every machine. The convolution
and the part between the operator and the output projection stand there twice: op by op, as a model
runs them on a CPU, and as the kernels that a GPU runs. The last rows are the whole block, and the
block compiled.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from gpu_timing import DEVICE, DTYPE, GPU, header, headline, in_turn
from gpu_timing import milliseconds as alone
from results import command, put, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metala_vision.kernels.depthwise_conv import depthwise_conv_silu
from metala_vision.kernels.gated_linear_attention import decay_and_key, gated_linear_attention
from metala_vision.kernels.gated_norm import gated_norm

NORM, CONVOLUTION = "self-augmentation, norm, gate", "3x3 convolution, SiLU"
KERNELS = ("operator", f"{NORM}: one kernel", f"{CONVOLUTION}: one kernel")
Part = tuple[Callable[..., Any], list[Tensor]]


class Traffic(TorchDispatchMode):
    """Counts operations that write memory, and the bytes of what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        held = {x.untyped_storage()._cdata for x in read}
        if any(x.untyped_storage()._cdata not in held for x in written):  # else a view
            self.launches += 1
            self.bytes += sum(x.nbytes for x in (*read, *written))
        return out


def parts(device: str, dtype: torch.dtype, batch: int, size: int) -> dict[str, Part]:
    """Each part as a function of its inputs, and the inputs."""
    torch.manual_seed(0)
    model: Any = timm.create_model("metala_tiny", depth=1, img_size=size).to(device, dtype)
    block = model.blocks[0]
    mixer = block.mixer
    side = size // 16
    B, N, C, H = batch, side * side, mixer.out_proj.in_features, mixer.num_heads
    K, V = mixer.key_width, mixer.value_width

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def projected() -> tuple[Tensor, ...]:
        one = random(B, N, H * (2 * K + 2 * V))
        return tuple(
            x.unflatten(2, (H, -1)) for x in one.split([H * K, H * K, H * V, H * V], dim=2)
        )

    x = random(B, side, side, C)
    q, gate, v, output_gate = projected()
    o = random(B, N, H, V)
    bias = mixer.output_gate_bias.detach().view(H, V)
    # As on a GPU from the gate; on a CPU the layer makes decay and key once, for both.
    from_gate = device != "cpu"
    log_decay, key = (gate, gate) if from_gate else decay_and_key(gate, 16.0)

    def operator(q: Tensor, v: Tensor, decay: Tensor, key: Tensor) -> Any:
        if from_gate:
            return gated_linear_attention(q, v, gate=decay)
        return gated_linear_attention(q, v, k=key, log_decay=decay)

    def tail(impl: str) -> Callable[..., Any]:
        def call(o: Tensor, g: Tensor, b: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor):
            name = "gate" if from_gate else "k"
            return gated_norm(o, g, b, q=q, v=v, w_aug=w, impl=impl, **{name: k})

        return call

    def convolution(impl: str) -> Callable[..., Any]:
        return lambda x, taps: depthwise_conv_silu(x, taps, top=1, left=1, impl=impl)

    taps = mixer.conv.conv.weight.detach().squeeze(1)
    tail_inputs = [o, output_gate, bias, q, key, v, mixer.w_aug.detach()]
    found: dict[str, Part] = {
        "norm": (block.norm1, [x]),
        f"{CONVOLUTION}: op by op": (convolution("portable"), [x, taps]),
        KERNELS[2]: (convolution("auto"), [x, taps]),
        "input projection": (mixer.in_proj, [x]),
    }
    if not from_gate:
        found["decay and key"] = (lambda gate: decay_and_key(gate, 16.0), [gate])
    found |= {
        "operator": (operator, [q, v, log_decay, key] if not from_gate else [q, v, gate, gate]),
        f"{NORM}: op by op": (tail("portable"), tail_inputs),
        KERNELS[1]: (tail("auto"), tail_inputs),
        "output projection": (mixer.out_proj, [x]),
        "residual": (torch.add, [x, x.clone()]),
        "norm and channel mixer": (lambda x: block.mlp(block.norm2(x)), [x]),
        "residual again": (torch.add, [x, x.clone()]),
        "whole block": (block, [x]),
    }
    return found


def counted(batch: int, size: int) -> dict[str, dict[str, float]]:
    """launches, and bytes and floor per token, of each part in bfloat16."""
    rows = {}
    for name, (function, inputs) in parts("meta", torch.bfloat16, batch, size).items():
        if name == "whole block":
            continue
        with torch.no_grad(), Traffic() as traffic:
            out = function(*inputs)
        tokens = batch * (size // 16) ** 2
        distinct = {id(x): x for x in inputs}.values()
        floor = sum(x.nbytes for x in (*distinct, *tree_leaves(out)))
        rows[name] = {
            "launches": traffic.launches, "bytes": traffic.bytes / tokens, "floor": floor / tokens,
        }  # fmt: skip
        if name in KERNELS:  # their states and second look at the inputs are not counted
            launches = 3 if name == "operator" and (size // 16) ** 2 > 256 else 1
            rows[name] |= {"launches": launches, "bytes": floor / tokens}
        if name == "norm and channel mixer":
            rows[name]["floor"] = float("nan")  # products between
    return rows


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each; on a CPU in turn, on a GPU with the cache cold."""
    if GPU:
        return {name: alone(call) for name, call in calls.items()}
    return dict(zip(calls, in_turn(list(calls.values()), repeats), strict=True))


def timed(batch: int, size: int, repeats: int) -> Iterator[tuple[str, dict[str, float]]]:
    """A column after the other: {part: milliseconds} of `forward`, and of `step`."""
    found = parts(DEVICE.type, DTYPE, batch, size)
    if not GPU:
        for name in KERNELS[1:]:
            del found[name]
    whole, (x,) = found["whole block"]
    found["whole block, compiled"] = (torch.compile(whole), [x])

    def forward(part: Part) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                part[0](*part[1])

        return call

    def step(part: Part) -> Callable[[], object]:
        inputs = [x.detach().requires_grad_() for x in part[1]]
        parameters = list(part[0].parameters()) if isinstance(part[0], torch.nn.Module) else []
        ones: list[Tensor] = []  # the gradient that comes in, beside the time

        def call() -> None:
            out = [x for x in tree_leaves(part[0](*inputs)) if x.requires_grad]
            if not ones:
                ones.extend(torch.ones_like(x) for x in out)
            torch.autograd.grad(out, [*inputs, *parameters], ones, allow_unused=True)

        return call

    yield "forward", milliseconds({n: forward(p) for n, p in found.items()}, repeats)
    yield "step", milliseconds({n: step(p) for n, p in found.items()}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=128 if GPU else 8)
    parser.add_argument("--size", type=int, default=224, help="of the image, a multiple of 16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    if arguments.size < 16 or arguments.size % 16 or arguments.batch < 1:
        parser.error(
            "--size must be a multiple of 16 and --batch >= 1, "
            f"got --size {arguments.size} --batch {arguments.batch}"
        )
    head = header("block")
    print(f"{headline(head)}, {DTYPE}, batch {arguments.batch} at {arguments.size} px")
    counts = counted(arguments.batch, arguments.size)
    rows = [{"part": name, **row} for name, row in counts.items()]
    fields = {"batch": arguments.batch, "size": arguments.size}
    for column, times in timed(arguments.batch, arguments.size, arguments.repeats):
        for name, ms in times.items():
            old = next((row for row in rows if row["part"] == name), {"part": name})
            put({"rows": rows}, {**old, column: ms}, ("part",))
        rows.sort(key=lambda row: row["part"].startswith("whole"))
        if arguments.out:  # what is there, should the second column be stopped
            save(arguments.out, {**head, **fields, "rows": rows})
    print("| part | launches | bytes | floor | forward ms | forward and backward ms |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            "" if row.get(key) is None or row[key] != row[key] else f"{row[key]:.0f}"
            for key in ("launches", "bytes", "floor")
        ]
        cells += [f"{row[key]:.3f}" if key in row else "not run" for key in ("forward", "step")]
        print("| " + " | ".join([row["part"], *cells]) + " |")


if __name__ == "__main__":
    command(main)
