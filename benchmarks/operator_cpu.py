"""Gated linear attention on this CPU beside softmax attention of the same width.

    python benchmarks/operator_cpu.py [--out FILE.json]

Times the portable form and torch's scaled_dot_product_attention (64 per head, 3 heads, float32) in
turn in one process, forward and forward with backward, and prints medians and their ratio. The
ratio is the figure to quote; the times belong to this machine at this moment.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metala_vision.kernels.gated_linear_attention import gated_linear_attention

H, K, V = 3, 32, 64
SHAPES = ((8, 49), (8, 196), (2, 1024), (1, 4096))


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(B: int, N: int, backward: bool, repeats: int) -> dict[str, float]:
    """Median milliseconds of both, taken in turn after a warm-up."""

    def leaf(width: int) -> Tensor:
        return torch.randn(B, N, H, width, requires_grad=backward)

    q, gate, v = leaf(K), leaf(K), leaf(V)
    query, key, value = leaf(V), leaf(V), leaf(V)

    def ours() -> None:
        o = gated_linear_attention(q, v, gate=gate)
        if backward:
            o.sum().backward()

    def softmax() -> None:
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        if backward:
            o.sum().backward()

    for _ in range(2):
        ours(), softmax()
    pairs = [(timed(ours), timed(softmax)) for _ in range(repeats)]
    ms = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
    return {"chunked_ms": ms[0], "sdpa_ms": ms[1], "ratio": ms[0] / ms[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="also write the rows as JSON")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'B':>3} {'N':>6}  {'':16} {'chunked ms':>10} {'sdpa ms':>10} {'ratio':>6}")
    for B, N in SHAPES:
        for backward in (False, True):
            row = compare(B, N, backward, arguments.repeats)
            rows.append({"B": B, "N": N, "backward": backward, **row})
            what = "forward+backward" if backward else "forward"
            print(
                f"{B:3} {N:6}  {what:16} {row['chunked_ms']:10.2f} {row['sdpa_ms']:10.2f} "
                f"{row['ratio']:6.2f}"
            )
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
