"""The table of associative recall: as Markdown for people, as CSV and JSON with every number."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Any

from metala_vision.compare.estimates import Estimate, estimate

if TYPE_CHECKING:
    from .mqar_sweep import Sweep

SOURCE = "MetaLA, arXiv 2411.10741, table A7"
# (length, pairs, width, mixer): accuracy in percent, as printed.
PUBLISHED = {
    (512, 80, 64, "metala"): "28.5", (512, 80, 64, "mamba"): "0.0",
    (512, 80, 64, "attention"): "> 99",
    (512, 80, 128, "metala"): "90.4", (512, 80, 128, "mamba"): "0.0",
    (512, 80, 128, "attention"): "> 99",
}  # fmt: skip
COLUMNS = {
    "length:pairs": "right", "width": "right", "mixer": "left", "convolution": "left",
    "accuracy %": "right", "seeds": "right", "best rate": "right", "% by rate": "right",
    "steps": "right", "state floats": "right", "parameters": "right", "published %": "right",
}  # fmt: skip


@dataclass
class Row:
    """A mixer at a length and width, at its best learning rate.

    accuracy: percent, over the seeds of that rate. steps: mean over them. by_rate: mean accuracy in
    percent of every learning rate that was trained.
    """

    mixer: str
    length: int
    pairs: int
    dim: int
    conv: str
    rate: float
    accuracy: Estimate
    accuracies: list[float]
    steps: float
    state_floats: int
    parameters: int
    by_rate: dict[float, float]

    @property
    def published(self) -> str | None:
        return PUBLISHED.get((self.length, self.pairs, self.dim, self.mixer))


def best_rate(found: Sequence[dict[str, Any]], seeds: Sequence[int]) -> float:
    """The learning rate of the largest mean accuracy over the seeds; of several the one that took
    the fewest steps, then the smallest."""
    of_rate: dict[float, list[dict[str, Any]]] = {}
    for one in found:
        if one["seed"] in seeds:
            of_rate.setdefault(one["learning_rate"], []).append(one)

    def merit(rate: float) -> tuple[float, float, float]:
        runs = of_rate[rate]
        steps = fsum(r["steps"] for r in runs) / len(runs)
        return fsum(r["accuracy"] for r in runs) / len(runs), -steps, -rate

    return max(of_rate, key=merit)


def rows_of(found: Sequence[dict[str, Any]], sweep: "Sweep") -> list[Row]:
    """In the order of lengths, widths and mixers."""
    from .mqar_model import conv_of

    cells: dict[tuple[int, int, int, str], list[dict[str, Any]]] = {}
    for one in found:
        cells.setdefault((one["length"], one["pairs"], one["dim"], one["mixer"]), []).append(one)
    rows = []
    for (length, pairs, dim, mixer), runs in cells.items():
        rate = best_rate(runs, sweep.seeds[: sweep.sweep_seeds])
        best = [r for r in runs if r["learning_rate"] == rate]
        percents = [100 * r["accuracy"] for r in best]
        by_rate = {
            x: estimate([100 * r["accuracy"] for r in runs if r["learning_rate"] == x]).mean
            for x in sorted({r["learning_rate"] for r in runs})
        }
        rows.append(
            Row(
                mixer, length, pairs, dim, conv_of(mixer, sweep.conv), rate, estimate(percents),
                percents, fsum(r["steps"] for r in best) / len(best), best[0]["state_floats"],
                best[0]["parameters"], by_rate,
            )
        )  # fmt: skip
    return rows


def cells_of(row: Row) -> list[str]:
    """A row of the table as text."""
    by_rate = " / ".join(f"{row.by_rate[rate]:.1f}" for rate in sorted(row.by_rate))
    return [
        f"{row.length}:{row.pairs}", str(row.dim), row.mixer, row.conv, str(row.accuracy),
        " / ".join(f"{x:.1f}" for x in row.accuracies), f"{row.rate:.3g}", by_rate,
        f"{row.steps:,.0f}", f"{row.state_floats:,}", f"{row.parameters:,}", row.published or "-",
    ]  # fmt: skip


def described(found: Sequence[dict[str, Any]], sweep: "Sweep") -> str:
    """How it was trained, in a line."""
    channel = {None: "each family's own", 0: "none"}.get(sweep.mlp_ratio, f"{sweep.mlp_ratio}")
    devices = ", ".join(sorted({f"{one['device']}, torch {one['torch']}" for one in found}))
    filler = "random tokens" if sweep.random_non_queries else "0"
    precision = {"no": "float32"}.get(sweep.precision, sweep.precision)
    return (
        f"{sweep.layers} layers, {sweep.num_heads} heads, channel mixer {channel}; vocabulary "
        f"{sweep.vocab:,}, power {sweep.power:g}, filler {filler}; {sweep.train_examples:,} "
        f"training and {sweep.test_examples:,} test examples, at most {sweep.epochs} epochs, until "
        f"a test accuracy above {sweep.stop_at:g}; AdamW, weight decay {sweep.weight_decay:g}, "
        f"dropout {sweep.dropout:g}, {precision}; {devices}."
    )


def notes(sweep: "Sweep") -> list[str]:
    """How to read the table."""
    count = len(sweep.seeds[: sweep.sweep_seeds])
    chosen = "all seeds" if count == len(sweep.seeds) else f"the first {count} of the seeds"
    printed = "; ".join(f"{length}:{pairs}, width {dim}, {mixer}: {value}"
                        for (length, pairs, dim, mixer), value in PUBLISHED.items())  # fmt: skip
    return [
        "accuracy: share of the questions of the test examples that are answered right after the "
        "last epoch, mean over seeds ± half the 95 % interval (n/a with one seed; of Student's t, "
        "which knows no 100 % and means little where a seed either finds the answers or guesses: "
        "seeds tells each), at the learning "
        f"rate of the largest mean over {chosen}. % by rate: the mean of what was trained at every "
        "learning rate, from the smallest on. state floats: numbers that a layer carries from "
        "token to token; of attention, which keeps all tokens, those of the whole sequence.",
        f"published %: {SOURCE}; its keys are as wide as the layer over its heads, where ours of "
        f"MetaLA and GLA are half as wide. All of it, length:pairs: {printed}.",
    ]


def as_markdown(rows: list[Row], found: Sequence[dict[str, Any]], sweep: "Sweep") -> str:
    """The table, and how to read it."""
    rules = ("---:" if side == "right" else "---" for side in COLUMNS.values())
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(cells_of(row))} |" for row in rows]
    for line in (described(found, sweep), *notes(sweep)):
        lines += ["", line]
    return "\n".join(lines) + "\n"


def as_csv(found: Sequence[dict[str, Any]]) -> str:
    """A line for each run; what holds a value for every epoch is in the JSON."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = [key for key, value in found[0].items() if not isinstance(value, list)]
    writer.writerow(names)
    writer.writerows([one[name] for name in names] for one in found)
    return table.getvalue()
