"""The Triton kernels on this GPU beside what one would use without them.

    python benchmarks/operators.py run --out operators.json [--lengths N ...] [--minutes M]
    python benchmarks/operators.py show operators.json [--plot operators.png]

ours       the operator, both directions, as a model calls it
chunked    the portable form of the same
chunk_gla  flash-linear-attention's causal operator twice, over flipped copies, with its gate and
           key made in PyTorch (`pip install metala-vision[bench]`; left out where it is missing)
sdpa       softmax attention of the same width, by PyTorch's choice of kernel

Forward, and forward with backward: medians, in milliseconds, with the cache cold; gpu: the kernels
of a call alone, without the time between them. floor: the least
bytes (each input read once, each output written once) over the bandwidth of a copy on this device.
Peak memory is above what the inputs hold: output, gradients, and what is needed on the way. Saved
is what a forward pass keeps for its backward pass, inputs included. Whole models: `models.py`.

Rows are written one by one, those that the goals are about first. A run with the same --out goes on
with what is missing; a row in which the process died is left at that. Without a GPU, `run` times
the portable form and SDPA on the CPU at small sizes, to show that it works.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import pictures
import torch
import torch.nn.functional as F
from gpu_timing import DEVICE, DTYPE, GPU, bandwidth, figures, header, headline
from results import OK, Budget, begin, command, measure_rows, run_and_show, shown
from subjects import FORMS, SHAPES
from torch import Tensor

from metala_vision.errors import UserError, one_line
from metala_vision.kernels.gated_linear_attention import gated_linear_attention

K, V = 32, 64
if not GPU:
    SHAPES = [(64, 4, 2), (196, 2, 3), (1024, 1, 3)]
KEYS = ("form", "N", "B", "H", "backward")


def chunk_gla() -> tuple[Callable[..., tuple[Tensor, Tensor]] | None, str]:
    """The operator, or None and why it is left out."""
    if not GPU:
        return None, "needs a GPU"
    try:
        from fla.ops.gla import chunk_gla
    except ModuleNotFoundError:
        return None, "flash-linear-attention is not installed"
    except Exception as error:  # of its many imports
        return None, f"cannot be imported: {type(error).__name__}: {one_line(error)[:200]}"
    return chunk_gla, ""


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
    gla, _ = chunk_gla()
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


def saved_mebibytes(form: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    """What a forward pass keeps for its backward pass: inputs, and what else autograd saves.

    Storages, each once, as long as all of them are alive.
    """
    saved = list(leaves)

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o = form()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    del o
    return sum(storages.values()) / 2**20


def measure(name: str, N: int, B: int, H: int, backward: bool) -> dict:
    """What one form needs; its status alone where that cannot be measured."""
    torch.manual_seed(0)
    options = {"device": DEVICE, "dtype": DTYPE, "requires_grad": backward}
    q, gate = (torch.randn(B, N, H, K, **options) for _ in range(2))
    v = torch.randn(B, N, H, V, **options)
    d_o = torch.randn_like(v, requires_grad=False) if backward else None
    form, leaves = forms(q, v, gate)[name]
    found = figures(step(form, leaves, d_o))
    if backward and found["status"] == OK:
        found["saved_mib"] = saved_mebibytes(form, leaves)
    return found


def available() -> list[str]:
    one = torch.zeros(1, 1, 1, 1, device=DEVICE)
    found = forms(one, one, one)
    return [name for name in FORMS if name in found]


def run(arguments: argparse.Namespace) -> None:
    budget = Budget(arguments.minutes)
    result = begin(arguments.out, header("operators"), arguments.retry)
    if "bandwidth" not in result:
        result["bandwidth"] = bandwidth()
    gla, why = chunk_gla()
    result["left_out"] = {} if gla else {"chunk_gla": why}
    lengths = arguments.lengths or [N for N, _, _ in SHAPES]
    wanted = rows(lengths, available(), result["bandwidth"])
    measure_rows(arguments.out, result, wanted, KEYS, budget)
    show(result)


def rows(
    lengths: list[int], names: list[str], bytes_per_second: float
) -> Iterator[tuple[dict, str, Callable[[], dict]]]:
    """Of each row what it begins with, its form, and what measures it."""
    for N, B, H in SHAPES:
        for backward in (True, False) if N in lengths else ():
            least = (2 * K + 2 * V + (4 * K + 3 * V if backward else 0)) * DTYPE.itemsize
            least *= B * N * H
            floor = {"bytes": least, "floor_ms": 1e3 * least / bytes_per_second}
            for name in names:
                shape = {"N": N, "B": B, "H": H, "backward": backward}
                yield {"form": name, **shape, **floor}, name, partial(measure, name, **shape)


def show(result: dict) -> None:
    print(headline(result))
    print(f"a copy moves {result['bandwidth'] / 1e9:.0f} GB/s")
    for form, why in result["left_out"].items():
        print(f"{form} is left out: {why}")
    print(f"{'N':>6} {'B':>4} {'H':>2} {'':13}", end="")
    print("".join(f"{form + ' ms':>13}" for form in FORMS), end="")
    print(f"{'ours gpu':>9}{'gla gpu':>9}{'floor ms':>10}{'ours/floor':>11}{'gla/ours':>9}"
          f"{'saved MiB':>10}{'gla':>8}"
          f"{'peak MiB':>9}{'gla':>8}")  # fmt: skip
    keys = sorted({tuple(r[k] for k in KEYS[1:]) for r in result["rows"]})
    for N, B, H, backward in keys:
        row = {r["form"]: r for r in result["rows"]
               if tuple(r[k] for k in KEYS[1:]) == (N, B, H, backward)}  # fmt: skip

        def cell(form: str, key: str, width: int, digits: int, row=row) -> str:
            value = row.get(form, {}).get(key)
            return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

        def ratio(above: float | None, below: float | None, width: int) -> str:
            return f"{above / below:{width}.1f}" if above and below else f"{'-':>{width}}"

        ours, gla = row.get("ours", {}).get("ms"), row.get("chunk_gla", {}).get("ms")
        floor = next(iter(row.values()))["floor_ms"]
        print(f"{N:6} {B:4} {H:2} {'with backward' if backward else 'forward':13}", end="")
        print("".join(cell(form, "ms", 13, 3) for form in FORMS), end="")
        print("".join(cell(form, "gpu_ms", 9, 3) for form in ("ours", "chunk_gla")), end="")
        print(f"{floor:10.4f}", end="")
        print(ratio(ours, floor, 11) + ratio(gla, ours, 9), end="")
        print(cell("ours", "saved_mib", 10, 1) + cell("chunk_gla", "saved_mib", 8, 1), end="")
        print(cell("ours", "peak_mib", 9, 0) + cell("chunk_gla", "peak_mib", 8, 0))
        for form, r in row.items():
            if r["status"] != OK:
                print(f"       {form}: {r['status']}")


def main() -> None:
    parser, measured = run_and_show(__doc__)
    measured.add_argument("--lengths", type=int, nargs="+", metavar="N", help="only these")
    arguments = parser.parse_args()
    if shown(arguments, show, pictures.operators):
        return
    lengths = [N for N, _, _ in SHAPES]
    if unknown := [N for N in arguments.lengths or () if N not in lengths]:
        raise UserError(f"--lengths must be among {lengths}, got {unknown[0]}")
    run(arguments)


if __name__ == "__main__":
    command(main)
