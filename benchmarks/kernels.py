"""The Triton kernels on this GPU beside what one would use without them.

    python benchmarks/kernels.py run --out kernels.json [--lengths N ...] [--models]
    python benchmarks/kernels.py show kernels.json [--plot kernels.png]

ours       the operator, both directions, as a model calls it
chunked    the portable form of the same
chunk_gla  flash-linear-attention's causal operator twice, over flipped copies, with its gate and
           key made in PyTorch (`pip install metala-vision[bench]`; left out where it is missing)
sdpa       softmax attention of the same width, by PyTorch's choice of kernel

Forward, and forward with backward: medians, in milliseconds, with the cache cold. floor: the least
bytes (each input read once, each output written once) over the bandwidth of a copy on this device.
Peak memory is above what the inputs hold: output, gradients, and what is needed on the way. Without
a GPU, `run` times the portable form and SDPA on the CPU at small sizes, to show that it works.
"""

import argparse
import json
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from gpu_timing import (
    DEVICE,
    DTYPE,
    GPU,
    bandwidth,
    commit,
    milliseconds,
    peak_mebibytes,
    versions,
)  # fmt: skip
from matplotlib.figure import Figure
from torch import Tensor

import metala_vision  # noqa: F401
from metala_vision.kernels.gated_linear_attention import gated_linear_attention

K, V = 32, 64
# tokens, batch and heads: about as many tokens in each, and the shapes that the targets name
SHAPES = (
    [(64, 256, 2), (196, 128, 3), (1024, 32, 3), (4096, 8, 3), (16384, 2, 3)]
    if GPU
    else [(64, 4, 2), (196, 2, 3), (1024, 1, 3)]
)
FORMS = ("ours", "chunked", "chunk_gla", "sdpa")


def chunk_gla() -> Callable[..., tuple[Tensor, Tensor]] | None:
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None
    return chunk_gla


def forms(q: Tensor, v: Tensor, gate: Tensor) -> dict[str, tuple[Callable[[], Tensor], list]]:
    """Of each form, a call that gives [B, N, H, V], and the tensors that want gradients."""
    qkv = [torch.randn_like(v, requires_grad=v.requires_grad) for _ in range(3)]
    heads_first = [x.transpose(1, 2) for x in qkv]
    ours = [q, v, gate]
    found: dict[str, tuple[Callable[[], Tensor], list]] = {
        "chunked": (lambda: gated_linear_attention(q, v, gate=gate, impl="chunked"), ours),
        "sdpa": (lambda: F.scaled_dot_product_attention(*heads_first).transpose(1, 2), qkv),
    }
    if GPU:
        found["ours"] = (lambda: gated_linear_attention(q, v, gate=gate, impl="triton"), ours)
    gla = chunk_gla() if GPU else None
    if gla is not None:

        def twice() -> Tensor:
            log_decay = F.logsigmoid(gate.float()) / 16
            k = -torch.expm1(log_decay)
            k, decay = k.to(q.dtype), log_decay.to(q.dtype)
            there, _ = gla(q, k, v, decay, scale=K**-0.5)
            back, _ = gla(q.flip(1), k.flip(1), v.flip(1), decay.flip(1), scale=K**-0.5)
            return there + back.flip(1)

        found["chunk_gla"] = (twice, ours)
    return found


def step(
    form: Callable[[], Tensor], leaves: list[Tensor], d_o: Tensor | None
) -> Callable[[], object]:
    if d_o is None:
        return form
    return lambda: torch.autograd.grad(form(), leaves, d_o)


def measure(N: int, B: int, H: int, bytes_per_second: float) -> list[dict]:
    """One row per form, for forward and for forward with backward."""
    rows = []
    for backward in (False, True):
        options = {"device": DEVICE, "dtype": DTYPE, "requires_grad": backward}
        q, gate = (torch.randn(B, N, H, K, **options) for _ in range(2))
        v = torch.randn(B, N, H, V, **options)
        d_o = torch.randn_like(v, requires_grad=False) if backward else None
        least = 2 * K + 2 * V + (4 * K + 3 * V if backward else 0)
        least *= B * N * H * q.element_size()
        for name, (form, leaves) in forms(q, v, gate).items():
            row = {"form": name, "N": N, "B": B, "H": H, "backward": backward, "bytes": least}
            row["floor_ms"] = 1e3 * least / bytes_per_second
            try:
                call = step(form, leaves, d_o)
                row["peak_mib"] = peak_mebibytes(call)
                row["ms"] = milliseconds(call)
            except torch.OutOfMemoryError:
                row["ms"] = None
            rows.append(row)
    return rows


def models(size: int, batch: int) -> list[dict]:
    """A compiled training step of metala_tiny and of DeiT-tiny, under autocast to bfloat16."""
    rows = []
    for name in ("metala_tiny", "deit_tiny_patch16_224"):
        model = timm.create_model(name, img_size=size).to(DEVICE)
        x = torch.randn(batch, 3, size, size, device=DEVICE)
        forward = torch.compile(model, dynamic=False) if GPU else model

        def train(model=model, forward=forward, x=x) -> None:
            model.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                loss = forward(x).square().mean()
            loss.backward()

        train()
        model.zero_grad()
        peak = peak_mebibytes(train)
        row = {"model": name, "size": size, "batch": batch, "peak_mib": peak}
        rows.append(row | {"ms": milliseconds(train)})
    return rows


def show(result: dict) -> None:
    print(f"{result['device']}, {result['versions']}, commit {result['commit']}")
    print(f"a copy moves {result['bandwidth'] / 1e9:.0f} GB/s")
    print(f"{'N':>6} {'B':>4} {'H':>2} {'':13}", end="")
    print("".join(f"{form + ' ms':>13}" for form in FORMS), end="")
    print(f"{'floor ms':>10}{'ours/floor':>11}{'gla/ours':>9}{'ours MiB':>9}{'gla MiB':>8}")
    keys = sorted({(r["N"], r["B"], r["H"], r["backward"]) for r in result["rows"]})
    for N, B, H, backward in keys:
        row = {r["form"]: r for r in result["rows"]
               if (r["N"], r["B"], r["H"], r["backward"]) == (N, B, H, backward)}  # fmt: skip

        def cell(form: str, key: str, width: int, digits: int, row=row) -> str:
            value = row.get(form, {}).get(key)
            return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

        def ratio(above: float | None, below: float | None, width: int) -> str:
            return f"{above / below:{width}.1f}" if above and below else f"{'-':>{width}}"

        ours, gla = row.get("ours", {}).get("ms"), row.get("chunk_gla", {}).get("ms")
        floor = row["sdpa"]["floor_ms"]
        print(f"{N:6} {B:4} {H:2} {'with backward' if backward else 'forward':13}", end="")
        print("".join(cell(form, "ms", 13, 3) for form in FORMS) + f"{floor:10.4f}", end="")
        print(ratio(ours, floor, 11) + ratio(gla, ours, 9), end="")
        print(cell("ours", "peak_mib", 9, 0) + cell("chunk_gla", "peak_mib", 8, 0))
    for row in result.get("models", []):
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(f"{row['model']:24} {row['size']:5} px batch {row['batch']:4} "
              f"training step {row['ms']:9.2f} ms, peak {peak} MiB")  # fmt: skip


def plot(result: dict, path: str) -> None:
    """Nanoseconds a token and head against N, one panel for forward, one with backward."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    colors = dict(zip(FORMS, ("#0072b2", "#56b4e9", "#009e73", "#d55e00"), strict=True))
    for axis, backward in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for form in FORMS:
            chosen = sorted(
                (r["N"], 1e6 * r["ms"] / (r["N"] * r["B"] * r["H"]))
                for r in result["rows"]
                if r["form"] == form and r["backward"] == backward and r["ms"]
            )
            if chosen:
                axis.plot(*zip(*chosen, strict=True), "o-", color=colors[form], label=form, ms=4)
        axis.set(xscale="log", yscale="log", xlabel="tokens N")
        axis.set_title("forward and backward" if backward else "forward")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nanoseconds per token and head")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{result['device']}, {result['dtype']}, K {K}, V {V}")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--out", required=True, help="the JSON file to write")
    run.add_argument("--lengths", type=int, nargs="+", metavar="N", help="only these")
    run.add_argument("--models", action="store_true", help="also training steps of whole models")
    view = commands.add_parser("show", help="a table of a file, and a plot")
    view.add_argument("file")
    view.add_argument("--plot", help="the PNG file to write")
    arguments = parser.parse_args()
    if arguments.command == "show":
        with open(arguments.file, encoding="utf-8") as file:
            result = json.load(file)
        show(result)
        if arguments.plot:
            plot(result, arguments.plot)
        return
    bytes_per_second = bandwidth()
    result = {
        "device": torch.cuda.get_device_name() if GPU else "CPU (no kernels here)",
        "dtype": str(DTYPE).removeprefix("torch."),
        "versions": versions(),
        "commit": commit(),
        "bandwidth": bytes_per_second,
        "rows": [
            row
            for N, B, H in SHAPES
            if not arguments.lengths or N in arguments.lengths
            for row in measure(N, B, H, bytes_per_second)
        ],
    }
    if arguments.models:
        sizes = [(224, 256), (1024, 8)] if GPU else [(64, 2)]
        result["models"] = [row for size, batch in sizes for row in models(size, batch)]
    with open(arguments.out, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
    show(result)


if __name__ == "__main__":
    main()
