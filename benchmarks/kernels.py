"""The Triton kernels on this GPU beside what one would use without them.

    python benchmarks/kernels.py run --out kernels.json [--lengths N ...] [--minutes M]
    python benchmarks/kernels.py show kernels.json [--plot kernels.png]

ours       the operator, both directions, as a model calls it
chunked    the portable form of the same
chunk_gla  flash-linear-attention's causal operator twice, over flipped copies, with its gate and
           key made in PyTorch (`pip install metala-vision[bench]`; left out where it is missing)
sdpa       softmax attention of the same width, by PyTorch's choice of kernel

Forward, and forward with backward: medians, in milliseconds, with the cache cold. floor: the least
bytes (each input read once, each output written once) over the bandwidth of a copy on this device.
Peak memory is above what the inputs hold: output, gradients, and what is needed on the way. Saved
is what a forward pass keeps for its backward pass, inputs included. Whole models: `models.py`.

Rows are written one by one, those that the goals are about first. A run with the same --out goes on
with what is missing; a row in which the process died is left at that. Without a GPU, `run` times
the portable form and SDPA on the CPU at small sizes, to show that it works.
"""

import argparse
from collections.abc import Callable

import pictures
import torch
import torch.nn.functional as F
from gpu_timing import (
    DEVICE,
    DTYPE,
    GPU,
    bandwidth,
    header,
    headline,
    milliseconds,
    peak_mebibytes,
    synchronize,
)
from results import (
    DIED,
    NOT_RUN,
    OK,
    OUT_OF_MEMORY,
    Budget,
    begin,
    command,
    put,
    run_and_show,
    save,
    shown,
)
from torch import Tensor

from metala_vision.errors import UserError, one_line
from metala_vision.kernels.gated_linear_attention import gated_linear_attention

K, V = 32, 64
# tokens, batch and heads: about as many tokens in each; the shapes that the goals name come first
SHAPES = (
    [(196, 128, 3), (4096, 8, 3), (16384, 2, 3), (1024, 32, 3), (64, 256, 2)]
    if GPU
    else [(64, 4, 2), (196, 2, 3), (1024, 1, 3)]
)
FORMS = ("ours", "chunk_gla", "sdpa", "chunked")
KEYS = ("form", "N", "B", "H", "backward")


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
    """What one form needs; its status where that cannot be measured."""
    torch.manual_seed(0)
    options = {"device": DEVICE, "dtype": DTYPE, "requires_grad": backward}
    q, gate = (torch.randn(B, N, H, K, **options) for _ in range(2))
    v = torch.randn(B, N, H, V, **options)
    d_o = torch.randn_like(v, requires_grad=False) if backward else None
    form, leaves = forms(q, v, gate)[name]
    call = step(form, leaves, d_o)
    try:
        saved = saved_mebibytes(form, leaves) if backward else None
        peak = peak_mebibytes(call)
        return {"status": OK, "ms": milliseconds(call), "peak_mib": peak, "saved_mib": saved}
    except torch.OutOfMemoryError:
        return {"status": OUT_OF_MEMORY}
    except Exception as error:  # a compiler's, of others' kernels too: the next row may do
        synchronize()  # where the device is lost, so is the process
        return {"status": f"failed: {type(error).__name__}: {one_line(error)[:200]}"}


def available() -> list[str]:
    one = torch.zeros(1, 1, 1, 1, device=DEVICE)
    found = forms(one, one, one)
    return [name for name in FORMS if name in found]


def run(arguments: argparse.Namespace) -> None:
    budget = Budget(arguments.minutes)
    result = begin(arguments.out, header("kernels"))
    result.setdefault("bandwidth", bandwidth())
    for N, B, H in SHAPES:
        if arguments.lengths and N not in arguments.lengths:
            continue
        for backward in (True, False):
            least = (2 * K + 2 * V + (4 * K + 3 * V if backward else 0)) * DTYPE.itemsize
            least *= B * N * H
            floor = {"bytes": least, "floor_ms": 1e3 * least / result["bandwidth"]}
            for name in available():
                row = {"form": name, "N": N, "B": B, "H": H, "backward": backward, **floor}
                old = [r for r in result["rows"] if all(r[k] == row[k] for k in KEYS)]
                if old and old[0]["status"] != NOT_RUN:
                    continue
                # The first of a form tunes itself, which says nothing of the next.
                kind = f"{name}, tuned" if name in budget.longest else name
                if not budget.fits(kind):
                    put(result, row | {"status": NOT_RUN}, KEYS)
                    continue
                put(result, row | {"status": DIED}, KEYS)
                save(arguments.out, result)
                try:
                    with budget.spending(kind):
                        row |= measure(name, N, B, H, backward)
                except (SystemExit, KeyboardInterrupt):  # stopped from outside
                    row |= {"status": NOT_RUN}
                    raise
                finally:
                    put(result, {"status": DIED, **row}, KEYS)
                    save(arguments.out, result)
    save(arguments.out, result)
    show(result)


def show(result: dict) -> None:
    print(headline(result))
    print(f"a copy moves {result['bandwidth'] / 1e9:.0f} GB/s")
    print(f"{'N':>6} {'B':>4} {'H':>2} {'':13}", end="")
    print("".join(f"{form + ' ms':>13}" for form in FORMS), end="")
    print(f"{'floor ms':>10}{'ours/floor':>11}{'gla/ours':>9}{'saved MiB':>10}{'gla':>8}"
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
        print("".join(cell(form, "ms", 13, 3) for form in FORMS) + f"{floor:10.4f}", end="")
        print(ratio(ours, floor, 11) + ratio(gla, ours, 9), end="")
        print(cell("ours", "saved_mib", 10, 1) + cell("chunk_gla", "saved_mib", 8, 1), end="")
        print(cell("ours", "peak_mib", 9, 0) + cell("chunk_gla", "peak_mib", 8, 0))
        for form, r in row.items():
            if r["status"] != OK:
                print(f"       {form}: {r['status']}")


def main() -> None:
    parser, measured = run_and_show(__doc__)
    measured.add_argument("--lengths", type=int, nargs="+", metavar="N", help="only these")
    measured.add_argument("--minutes", type=float, default=1e4, help="to take at most")
    arguments = parser.parse_args()
    if shown(arguments, show, pictures.kernels):
        return
    lengths = [N for N, _, _ in SHAPES]
    if unknown := [N for N in arguments.lengths or () if N not in lengths]:
        raise UserError(f"--lengths must be among {lengths}, got {unknown[0]}")
    run(arguments)


if __name__ == "__main__":
    command(main)
