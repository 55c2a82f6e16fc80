"""What a scaling measurement says: medians, growth, the table as text and as numbers.

No torch here: plain numbers.
"""

import csv
import io
import math
from dataclasses import dataclass
from statistics import linear_regression, median, quantiles
from typing import Any

OVER = "over"
COLUMNS = (
    "model", "px", "tokens", "ms/image", "quartiles", "images/s", "ns/token", "growth", "MiB",
)  # fmt: skip
NUMBERS = (
    "ms", "ms_q1", "ms_q3", "images_per_s", "ns_per_token", "growth", "memory_mib", "waited",
)  # fmt: skip


@dataclass
class Measured:
    """A model at a size. Times in ms an image; `state` says why there are none.

    tokens of the patch grid, of one image; memory_mib the most that a pass of the batch adds to
    weights and images; growth the exponent p of time ~ tokens^p from the size measured before;
    waited the share of the time in which other processes had the core, which ms leaves out.
    """

    mode: str
    model: str
    size: int
    tokens: int
    parameters: int
    state: str = "measured"
    error: str = ""
    passes: int = 0
    waited: float | None = None
    ms: float | None = None
    ms_q1: float | None = None
    ms_q3: float | None = None
    memory_mib: float | None = None
    growth: float | None = None

    @property
    def images_per_s(self) -> float | None:
        return None if self.ms is None else 1e3 / self.ms

    @property
    def ns_per_token(self) -> float | None:
        return None if self.ms is None else 1e6 * self.ms / self.tokens


def spread(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; linear between the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, middle, third = quantiles(values, n=4, method="inclusive")
    return first, middle, third


def summary(
    mode: str, model: str, size: int, tokens: int, parameters: int, visits: list[dict[str, Any]]
) -> Measured:
    """Of all rounds: the median and the quartiles of all passes, the median of the peaks."""
    row = Measured(mode, model, size, tokens, parameters)
    timed = [visit for visit in visits if "passes" in visit]
    failed = next((visit for visit in visits if "passes" not in visit), None)
    if timed:
        ms = [1e3 * s / visit["batch_size"] for visit in timed for s in visit["passes"]]
        row.passes = len(ms)
        row.ms_q1, row.ms, row.ms_q3 = spread(ms)
        ran, lost = sum(sum(v["passes"]) for v in timed), sum(v["waited"] for v in timed)
        row.waited = lost / (ran + lost)
        row.memory_mib = median(visit["memory_mib"] for visit in timed)
    elif failed is not None and "over" in failed:
        row.state = f"{OVER} {failed['over']:g} s"
    elif failed is not None and "full" in failed:
        row.state = "out of memory"
    if failed is not None and "error" in failed:
        row.state = "measured" if timed else "failed"
        row.error = failed["error"]
    if failed is not None and timed:
        why = f"{OVER} {failed['over']:g} s" if "over" in failed else "out of memory"
        row.error = f"{row.error or why}, after {len(timed)} of its rounds"
    return row


def exponent(tokens: list[int], times: list[float]) -> float:
    """p of time ~ tokens^p: the slope of log time over log tokens, by least squares."""
    return linear_regression([math.log(n) for n in tokens], [math.log(t) for t in times]).slope


def with_growth(rows: list[Measured]) -> list[Measured]:
    """The same rows, of one mode and model in order of size, their growth filled in."""
    before: Measured | None = None
    for row in rows:
        if row.ms is None:
            continue
        if before is not None and before.ms is not None and row.tokens > before.tokens:
            row.growth = exponent([before.tokens, row.tokens], [before.ms, row.ms])
        before = row
    return rows


def series(rows: list[Measured]) -> dict[tuple[str, str], list[Measured]]:
    """Rows by mode and model, in their order."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for row in rows:
        found.setdefault((row.mode, row.model), []).append(row)
    return found


def growth_line(rows: list[Measured]) -> str:
    """How one model grows in one mode, in words; '' with fewer than two sizes."""
    timed = [row for row in rows if row.ms is not None]
    if len({row.tokens for row in timed}) < 2:
        return ""
    power = exponent([row.tokens for row in timed], [row.ms or 0.0 for row in timed])
    per_token = [row.ns_per_token or 0.0 for row in timed]
    return (
        f"{rows[0].model} ({rows[0].parameters:,} parameters), {rows[0].mode}: time grows as "
        f"tokens^{power:.2f} from {timed[0].size} to {timed[-1].size} px; time per token, largest "
        f"over smallest: {max(per_token) / min(per_token):.2f}"
    )


def cells(row: Measured) -> list[str]:
    """A row as text; what is not known is a dash."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def short(value: float | None) -> str:
        """Three digits at least, and no exponent."""
        if value is None:
            return "-"
        return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"

    quartiles = "-" if row.ms is None else f"{short(row.ms_q1)} to {short(row.ms_q3)}"
    time = row.state if row.ms is None else short(row.ms)
    return [
        row.model, str(row.size), f"{row.tokens:,}", time, quartiles, short(row.images_per_s),
        number(row.ns_per_token, ",.0f"), number(row.growth, ".2f"),
        number(row.memory_mib, ",.0f" if (row.memory_mib or 0) >= 10 else ".1f"),
    ]  # fmt: skip


def as_markdown(rows: list[Measured], how: str) -> str:
    """A table for each mode, how the models grow, what failed, and how it was measured."""
    lines: list[str] = []
    modes = list(dict.fromkeys(row.mode for row in rows))
    for mode in modes:
        if len(modes) > 1:
            lines += [f"{mode}:", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows if row.mode == mode]
        lines.append("")
    lines += [f"- {line}" for part in series(rows).values() if (line := growth_line(part))]
    lines += [f"- {r.model} {r.size} px {r.mode} failed: {r.error}" for r in rows if r.error]
    waits = [row.waited for row in rows if row.waited is not None]
    most = max(waits, default=0.0)
    lines += ["", how]
    if most > 0:
        lines.append(
            "Time in which other processes had the core is left out: of a point at most "
            f"{100 * most:.1f} %."
        )
    lines.append(
        "Median and quartiles of the passes; growth is the exponent of time over tokens from the "
        "size before; MiB what a pass of the batch adds to weights and images."
    )
    return "\n".join(lines) + "\n"


def as_csv(rows: list[Measured]) -> str:
    """The numbers, unrounded."""
    table = io.StringIO()
    writer = csv.writer(table)
    facts = ("mode", "model", "size", "tokens", "parameters", "state")
    writer.writerow([*facts, *NUMBERS, "passes", "error"])
    for row in rows:
        writer.writerow([getattr(row, name) for name in (*facts, *NUMBERS, "passes", "error")])
    return table.getvalue()
