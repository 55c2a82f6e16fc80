"""The picture of a scaling measurement."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from metala_vision.plots import save, style

from .table import Measured, series


def scaling_curves(
    rows: list[Measured], path: Path, patch: tuple[int, int] | None, stacked: bool = False
) -> None:
    """Time an image and memory of a pass over the side of the images, as a PNG or SVG.

    Args:
        rows: a row of panels for each of their modes. Where a size has no time, a cross at the top
            says why.
        patch: height and width in px, for a second axis in tokens; None where models differ in it.
        stacked: time above memory, for a narrow page.
    Raises:
        UserError: for a file that cannot be written.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    sizes = sorted({row.size for row in rows})
    across, columns = (1, 2) if stacked else (2, 3)
    width, height = (4.8, 4.0) if stacked else (11, 4.6)
    heads = 0.25 * -(-len(models) // columns)
    down = len(modes) * 2 // across
    figure = Figure(figsize=(width, heads + height * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).reshape(len(modes), 2)
    for (time_axis, memory_axis), mode in zip(panels, modes, strict=True):
        parts = [part for (kind, _), part in series(rows).items() if kind == mode]
        looks = [style(models.index(part[0].model)) for part in parts]
        for part, look in zip(parts, looks, strict=True):
            _curves(time_axis, memory_axis, part, look)
        _guides(time_axis, [row for part in parts for row in part], sizes)
        for axis in (time_axis, memory_axis):
            _scales(axis, sizes, patch)
            _missing(axis, parts, looks)
        what = {"inference": "inference", "train": "forward and backward"}[mode]
        time_axis.set_ylabel(f"ms an image, {what}")
        memory_axis.set_ylabel(f"MiB that a pass adds, {what}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=min(columns, len(labels)),
            frameon=False,
        )
    save(figure, path)


def _curves(time_axis: Axes, memory_axis: Axes, rows: list[Measured], look: dict[str, Any]) -> None:
    """One model in both panels."""
    timed = [row for row in rows if row.ms is not None]
    x = [row.size for row in timed]
    ms = [row.ms or 0.0 for row in timed]
    time_axis.plot(x, ms, label=rows[0].model, **look)
    time_axis.vlines(
        x, [row.ms_q1 or 0.0 for row in timed], [row.ms_q3 or 0.0 for row in timed],
        color=look["color"], linewidth=3, alpha=0.4,
    )  # fmt: skip
    # A logarithm has no place for 0: less than a page.
    memory_axis.plot(x, [max(row.memory_mib or 0.0, 2**-8) for row in timed], **look)


def _guides(axis: Axes, rows: list[Measured], sizes: list[int]) -> None:
    """Slopes to compare with: time in proportion to the tokens, and to their square.

    They begin below the smallest size and end where the curves end.
    """
    timed = [row for row in rows if row.ms is not None]
    if len({row.size for row in timed}) < 2:
        return
    first, last = min(row.size for row in timed), sizes[-1]
    start = 0.6 * min(row.ms or 0.0 for row in timed if row.size == first)
    top = max(row.ms or 0.0 for row in timed)
    for power, name in ((1, "linear in tokens"), (2, "quadratic")):
        end = min(last, first * (top / start) ** (1 / (2 * power)))
        middle = math.sqrt(first * end)
        y = [start * (x / first) ** (2 * power) for x in (middle, end)]
        axis.plot([first, end], [start, y[1]], color="#888888", linewidth=1, linestyle=(0, (1, 2)))
        # Right below the one, left of the end of the other: beside the curves between them.
        axis.annotate(
            name, (middle, y[0]) if power == 1 else (end, y[1]),
            xytext=(6, -4) if power == 1 else (-6, -4), textcoords="offset points",
            ha="left" if power == 1 else "right", va="top" if power == 1 else "bottom",
            color="#555555", fontsize=8,
        )  # fmt: skip


def _scales(axis: Axes, sizes: list[int], patch: tuple[int, int] | None) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.9 * sizes[0], 1.1 * sizes[-1])
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("side of the images, px")
    axis.grid(alpha=0.3)
    if patch is not None:
        upper = axis.secondary_xaxis("top")
        tokens = [-(-size // patch[0]) * -(-size // patch[1]) for size in sizes]
        upper.set_xticks(sizes, [f"{count:,}" for count in tokens])
        upper.xaxis.set_minor_locator(NullLocator())
        upper.set_xlabel("tokens")


def _missing(axis: Axes, parts: list[list[Measured]], looks: list[dict[str, Any]]) -> None:
    """Crosses above the curves, a line of them for each model that lacks sizes, and why."""
    height = 0.955
    for part, look in zip(parts, looks, strict=True):
        missing = [row for row in part if row.ms is None]
        if not missing:
            continue
        axis.plot(
            [row.size for row in missing], [height] * len(missing), marker="x", markersize=8,
            markeredgewidth=2, linestyle="", color=look["color"],
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        left = math.log(missing[0].size / axis.get_xlim()[0]) < 0.5 * math.log(
            axis.get_xlim()[1] / axis.get_xlim()[0]
        )
        beside = missing[-1] if left else missing[0]
        axis.annotate(
            ", ".join(dict.fromkeys(row.state for row in missing)), (beside.size, height),
            xycoords=axis.get_xaxis_transform(), xytext=(8 if left else -8, 0),
            textcoords="offset points", ha="left" if left else "right", va="center", fontsize=8,
            color=look["color"],
        )  # fmt: skip
        height -= 0.055
    low, high = axis.get_ylim()
    if not any(row.ms is not None for part in parts for row in part):
        axis.set(ylim=(1, 10), yticks=[])
    elif height < 0.95:
        axis.set_ylim(low, low * (high / low) ** (1 / (height + 0.01)))
