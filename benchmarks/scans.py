"""The elementwise recurrences on this GPU: linear_recurrence (HGRN, LRU), selective_scan (Mamba).

    python benchmarks/scans.py run --out scans.json [--lengths N ...] [--minutes M]
    python benchmarks/scans.py show scans.json

ours     the operator, both directions, as a layer of a tiny model calls it
chunked  the portable form of the same
fla      flash-linear-attention's HGRN operator, real and imaginary part side by side, twice, over
         flipped copies (`pip install metala-vision[bench]`; left out where it is missing)

Forward, and forward with backward: medians in milliseconds. floor: the least bytes (each input read
once, each output written once) over the bandwidth of a copy on this device. exp: exponentials of
the forward pass, all of which a selective scan needs. Without a GPU the portable forms run on the
CPU at small sizes, to show that it works.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_timing import DEVICE, DTYPE, GPU, bandwidth, figures, header, headline
from results import OK, Budget, begin, command, measure_rows, run_and_show, shown
from torch import Tensor

from metala_vision.errors import UserError
from metala_vision.kernels.linear_recurrence import linear_recurrence
from metala_vision.kernels.selective_scan import selective_scan

C, E, M = 192, 384, 16  # of tiny models
SHAPES = (
    [(196, 128), (1024, 32), (4096, 8), (16384, 2)] if GPU else [(64, 2), (196, 2)]
)  # tokens, batch
Form = Callable[[], Tensor]


def hgrn(N: int, B: int, backward: bool) -> tuple[dict[str, Form], list[Tensor], int, int]:
    """Forms, tensors that want gradients, bytes, exponentials."""
    b = torch.randn(2, B, N, 2, C, device=DEVICE, dtype=DTYPE, requires_grad=backward)
    log_decay = -torch.rand(B, N, C, device=DEVICE).requires_grad_(backward)
    forms: dict[str, Form] = {
        impl: lambda impl=impl: linear_recurrence(b, log_decay, impl=impl)
        for impl in ("triton", "chunked")
        if GPU or impl == "chunked"
    }
    try:
        from fla.ops.hgrn import chunk_hgrn
    except Exception:  # of its many imports, too
        chunk_hgrn = None
    if chunk_hgrn is not None and GPU:

        def twice() -> Tensor:
            g = log_decay.to(DTYPE).repeat(1, 1, 2)
            there, _ = chunk_hgrn(b[0].flatten(2), g)
            back, _ = chunk_hgrn(b[1].flatten(2).flip(1), g.flip(1))
            return torch.stack([there, back.flip(1)]).view_as(b)

        forms["fla"] = twice
    states, decays = b.nbytes, log_decay.nbytes
    least = 2 * states + decays
    if backward:  # incoming gradient and states read, both gradients written
        least += 3 * states + 2 * decays
    return forms, [b, log_decay], least, B * N * C


def mamba(N: int, B: int, backward: bool) -> tuple[dict[str, Form], list[Tensor], int, int]:
    """The same for Vim's block."""

    def made(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(2, *shape, device=DEVICE, dtype=dtype)

    inputs = {
        "u": made(B, N, E), "delta": made(B, N, E) - 4, "A": -made(E, M, dtype=torch.float32).abs(),
        "k": made(B, N, M), "q": made(B, N, M), "skip": made(E, dtype=torch.float32),
        "delta_bias": made(E, dtype=torch.float32),
    }  # fmt: skip
    for x in inputs.values():
        x.requires_grad_(backward)
    forms: dict[str, Form] = {
        impl: lambda impl=impl: selective_scan(**inputs, impl=impl)
        for impl in ("triton", "chunked")
        if GPU or impl == "chunked"
    }
    read = sum(x.nbytes for x in inputs.values())
    out = inputs["u"].nbytes // 2
    least = read + out + (out + 2 * read if backward else 0)
    return forms, list(inputs.values()), least, 2 * B * N * E * M


def rows(
    shapes: list[tuple[int, int]], bytes_per_second: float
) -> Iterator[tuple[dict, str, Callable[[], dict]]]:
    """Of each row what it begins with, its kind, and what measures it."""
    for N, B in shapes:
        for name, operator in (("linear_recurrence", hgrn), ("selective_scan", mamba)):
            for backward in (False, True):
                forms, _, least, exponentials = operator(N, B, backward)
                names = list(forms)
                del forms  # with their tensors
                for form in names:
                    row = {
                        "operator": name, "form": form.replace("triton", "ours"), "N": N, "B": B,
                        "backward": backward, "exp": exponentials, "bytes": least,
                        "floor_ms": 1e3 * least / bytes_per_second,
                    }  # fmt: skip
                    made = partial(measure, operator, form, N, B, backward)
                    yield row, f"{name}, {form}", made


def measure(operator: Callable, form: str, N: int, B: int, backward: bool) -> dict:
    """The rest of a row."""
    forms, leaves, _, _ = operator(N, B, backward)
    call = forms[form]
    if not backward:
        return figures(call)
    made: list[Tensor] = []  # the gradient that comes in, beside the time

    def step() -> object:
        y = call()
        if not made:
            made.append(torch.ones_like(y))
        return torch.autograd.grad(y, leaves, made[0])

    return figures(step)


def show(result: dict) -> None:
    print(headline(result))
    print(f"{'operator':18}{'':14}{'N':>6}{'B':>5} {'form':8}{'ms':>10}{'floor ms':>10}"
          f"{'x floor':>9}{'exp/ns':>8}{'MiB':>8}")  # fmt: skip
    for r in result["rows"]:
        what = "with backward" if r["backward"] else "forward"
        print(f"{r['operator']:18}{what:14}{r['N']:6}{r['B']:5} {r['form']:8}", end="")
        if r["status"] != OK:
            print(f"  {r['status']}")
            continue
        peak = "-" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
        print(f"{r['ms']:10.3f}{r['floor_ms']:10.4f}{r['ms'] / r['floor_ms']:9.1f}"
              f"{1e-6 * r['exp'] / r['ms']:8.2f}{peak:>8}")  # fmt: skip


def main() -> None:
    parser, measured = run_and_show(__doc__, picture=False)
    measured.add_argument("--lengths", type=int, nargs="+", metavar="N", help="only these")
    arguments = parser.parse_args()
    if shown(arguments, show):
        return
    lengths = [N for N, _ in SHAPES]
    if unknown := [N for N in arguments.lengths or () if N not in lengths]:
        raise UserError(f"--lengths must be among {lengths}, got {unknown[0]}")
    budget = Budget(arguments.minutes)
    result = begin(arguments.out, header("scans"), arguments.retry)
    if "bandwidth" not in result:
        result["bandwidth"] = bandwidth()
    shapes = [shape for shape in SHAPES if shape[0] in (arguments.lengths or lengths)]
    keys = ("operator", "form", "N", "B", "backward")
    measure_rows(arguments.out, result, rows(shapes, result["bandwidth"]), keys, budget)
    show(result)


if __name__ == "__main__":
    command(main)
