"""Gated linear attention on this CPU beside softmax attention of the same width.

    python benchmarks/operator_cpu.py [--out FILE.json] [--plot FILE.png] [--lengths N ...]

The portable form at N(0,1) gates and at gates of -60 (where every chunk takes its slower, always
safe way), torch's scaled_dot_product_attention (64 per head) and the token-by-token reference; 3
heads, float32, forward and forward with backward, in turn in one process. Medians; the ratios are
the figures to quote, the times belong to this machine at this moment.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_timing import header
from matplotlib.figure import Figure
from results import command, save
from torch import Tensor

from metala_vision import plots
from metala_vision.errors import UserError
from metala_vision.files import check_outputs, check_picture
from metala_vision.kernels.gated_linear_attention import gated_linear_attention

H, K, V = 3, 32, 64
BATCH = {49: 8, 196: 8, 1024: 2}  # 1 for longer ones
LENGTHS = (49, 196, 1024, 4096, 16384)
FORMS = ("chunked", "steep", "sdpa", "reference")


def forms(B: int, N: int, backward: bool) -> dict[str, Callable[[], Tensor]]:
    def leaf(width: int) -> Tensor:
        return torch.randn(B, N, H, width).requires_grad_(backward)

    q, gate, v = leaf(K), leaf(K), leaf(V)
    steep = torch.full_like(gate, -60.0).requires_grad_(backward)
    qkv = [leaf(V).transpose(1, 2) for _ in range(3)]
    return {
        "chunked": lambda: gated_linear_attention(q, v, gate=gate),
        "steep": lambda: gated_linear_attention(q, v, gate=steep),
        "sdpa": lambda: F.scaled_dot_product_attention(*qkv),
        "reference": lambda: gated_linear_attention(q, v, gate=gate, impl="reference"),
    }


def timed(form: Callable[[], Tensor], backward: bool) -> float:
    start = time.perf_counter()
    o = form()
    if backward:
        o.sum().backward()
    return time.perf_counter() - start


def compare(N: int, backward: bool, seconds: float) -> dict[str, float]:
    """Median milliseconds of each form, in turn for about so many seconds, the reference once."""
    B = BATCH.get(N, 1)
    named = forms(B, N, backward)
    once = timed(named.pop("reference"), backward)
    first = [timed(form, backward) for form in named.values()]
    repeats = max(3, min(60, round(seconds / sum(first))))
    rounds = [[timed(form, backward) for form in named.values()] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    row = dict(zip(named, medians, strict=True)) | {"reference": once}
    return {"B": B, "N": N, "backward": backward} | {f"{f}_ms": 1e3 * row[f] for f in FORMS}


def plot(rows: list[dict], path: Path) -> None:
    """Microseconds a token against N, one panel for forward, one for forward with backward."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    labels = ("gated linear attention", "the same, steep gates", "softmax (SDPA)", "token by token")
    colors = ("#0072b2", "#56b4e9", "#d55e00", "#999999")
    for axis, backward in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        chosen = [row for row in rows if row["backward"] == backward]
        for form, label, color in zip(FORMS, labels, colors, strict=True):
            y = [1e3 * row[f"{form}_ms"] / (row["B"] * row["N"]) for row in chosen]
            axis.plot([row["N"] for row in chosen], y, "o-", color=color, label=label, ms=4)
        axis.set(xscale="log", yscale="log", xlabel="tokens N")
        axis.set_xticks([row["N"] for row in chosen], [str(row["N"]) for row in chosen])
        axis.minorticks_off()
        axis.set_title("forward and backward" if backward else "forward")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("microseconds per token")
    figure.axes[0].legend(frameon=False, fontsize=8)
    threads = torch.get_num_threads()
    figure.suptitle(f"{H} heads, float32, {threads} threads of a CPU, torch {torch.__version__}")
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--plot", type=Path, help="also draw time per token against N, as a PNG")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument("--seconds", type=float, default=3.0, help="for one row (default 3)")
    arguments = parser.parse_args()
    if fewest := [N for N in arguments.lengths if N < 1]:
        raise UserError(f"--lengths must be >= 1, got {fewest[0]}")
    check_picture("--plot", arguments.plot)
    check_outputs({"--out": arguments.out, "--plot": arguments.plot})
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'B':>2} {'N':>6} {'':12}" + "".join(f"{f + ' ms':>13}" for f in FORMS), end="")
    print(f"{'chunked/sdpa':>14}{'steep/sdpa':>12}")
    for N in arguments.lengths:
        for backward in (False, True):
            row = compare(N, backward, arguments.seconds)
            rows.append(row)
            print(f"{row['B']:2} {N:6} {'with backward' if backward else 'forward':12}", end="")
            print("".join(f"{row[f'{f}_ms']:13.2f}" for f in FORMS), end="")
            ratios = [row[f"{form}_ms"] / row["sdpa_ms"] for form in ("chunked", "steep")]
            print(f"{ratios[0]:14.2f}{ratios[1]:12.2f}", flush=True)
    if arguments.out:
        save(arguments.out, {**header("operator_cpu"), "rows": rows})
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    command(main)
