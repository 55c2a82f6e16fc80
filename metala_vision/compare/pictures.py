"""The pictures of a comparison: a panel for each figure of the table, and the learning curves."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metala_vision.plots import save, style

from .table import Row

LONGEST = 22  # characters of a label
CURVE_POINTS = 20  # means over so many parts of a run: what the text table can hold too


@dataclass
class Curve:
    """How a run went: (step, value) pairs."""

    name: str
    seed: int
    loss: list[tuple[int, float]] = field(default_factory=list)
    """Training loss, the mean of each part of the run."""
    top1: list[tuple[int, float]] = field(default_factory=list)
    """Held-out, percent."""


def short(name: str) -> str:
    """What of a long name a picture has room for."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def curve_of(name: str, seed: int, metrics: list[dict[str, Any]]) -> Curve:
    """From the lines of a run's metrics.jsonl."""
    train = [line for line in metrics if line["event"] == "train" and line["loss"] is not None]
    size = max(1, -(-len(train) // CURVE_POINTS))
    parts = [train[i : i + size] for i in range(0, len(train), size)]
    loss = [(part[-1]["step"], sum(x["loss"] for x in part) / len(part)) for part in parts]
    top1 = [(line["step"], line["top1"]) for line in metrics if line["event"] == "eval"]
    return Curve(name, seed, loss, top1)


@dataclass
class Panel:
    """One figure of the table over the members."""

    name: str
    title: str
    value: Callable[[Row], float | None]
    form: str


PANELS = (
    Panel("top1", "top-1, % of the held-out images", lambda row: row.top1 and row.top1.mean, ".2f"),
    Panel("train", "training, images a second", lambda row: row.train_img_s, ".0f"),
    Panel("inference", "inference, images a second", lambda row: row.inference_img_s, ".0f"),
    Panel("memory", "peak memory of training, MiB", lambda row: row.memory_mib, ".0f"),
    Panel("gflops", "GFLOPs an image", lambda row: row.gflops, ".3g"),
)


def known(rows: list[Row]) -> list[Panel]:
    """The panels that have anything to show."""
    return [panel for panel in PANELS if any(panel.value(row) is not None for row in rows)]


def _draw(axis: Axes, panel: Panel, rows: list[Row], names: bool) -> None:
    values = [panel.value(row) for row in rows]
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            where = axis.get_yaxis_transform()  # at the axis, wherever that begins
            text = " failed" if row.errors else " -"
            axis.text(0, i, text, va="center", color="#555555", transform=where)
            continue
        look = style(i)
        end = value
        if panel.name == "top1" and row.top1 is not None:
            half = row.top1.half_width
            axis.errorbar(
                value, i, xerr=half, color=look["color"], marker=look["marker"], capsize=4
            )
            end = value + (half or 0.0)
            text = str(row.top1)
        else:
            axis.barh(i, value, color=look["color"], height=0.6)
            text = format(value, panel.form)
        axis.annotate(
            text, (end, i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    _limits(axis, panel, rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(
        range(len(rows)), [short(row.name) for row in rows] if names else [""] * len(rows)
    )
    axis.set_title(panel.title, fontsize=10, loc="left" if names else "center")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _limits(axis: Axes, panel: Panel, rows: list[Row]) -> None:
    """From 0 for bars, around the values for points; with room for the numbers behind them."""
    values = [value for value in map(panel.value, rows) if value is not None]
    low, high = 0.0, max(values, default=1.0) or 1.0
    if panel.name == "top1":
        halves = [(row.top1.half_width or 0.0) if row.top1 else 0.0 for row in rows]
        low = max(0.0, min(values, default=0.0) - max(halves, default=0.0))
        high = min(100.0, high + max(halves, default=0.0))
        low, high = low - 0.1 * (high - low or 1.0), high or 1.0
    axis.set_xlim(low, high + (0.65 if panel.name == "top1" else 0.3) * (high - low))
    # No tick where no value can be.
    axis.set_xticks([x for x in axis.get_xticks() if max(low, 0) <= x <= high * 1.001])


def _has_accuracy(curves: list[Curve]) -> bool:
    """Whether top-1 over the steps is more than the points of the table."""
    return any(len(curve.top1) > 1 for curve in curves)


def _curves(axes: Sequence[Axes], curves: list[Curve], rows: list[Row]) -> None:
    """Training loss on the first of the axes, top-1 on the second where there is one."""
    places = {row.name: i for i, row in enumerate(rows)}
    labelled = set()
    for curve in curves:
        look = style(places[curve.name])
        label = None if curve.name in labelled else short(curve.name)
        labelled.add(curve.name)
        for axis, pairs in zip(axes, (curve.loss, curve.top1), strict=False):
            axis.plot(*_columns(pairs), label=label, **look)
    for axis, what in zip(axes, ("training loss", "held-out top-1, %"), strict=False):
        axis.set(xlabel="step", ylabel=what)
        axis.set_xlim(left=0)
        if axis is not axes[0]:  # a loss begins nowhere near 0, and its differences are small
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


def _columns(pairs: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def draw_panels(rows: list[Row], path: Path) -> None:
    """All panels side by side, as a PNG."""
    panels = known(rows)
    if not panels:
        return
    figure = Figure(figsize=(1.4 + 2.7 * len(panels), 1 + 0.42 * len(rows)), layout="constrained")
    for i, (axis, panel) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)
    ):
        _draw(axis, panel, rows, names=i == 0)
    save(figure, path)


def draw_curves(curves: list[Curve], rows: list[Row], path: Path) -> None:
    """Training loss, and top-1 where it was taken more than once, over the steps, as a PNG."""
    count = 2 if _has_accuracy(curves) else 1
    figure = Figure(figsize=(2 + 4 * count, 4.6), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    _curves(axes, curves, rows)
    _legend(figure, axes[0])
    save(figure, path)


def panel_svg(panel: Panel, rows: list[Row]) -> str:
    """One panel as SVG, of a phone's width."""
    figure = Figure(figsize=(4.4, 0.8 + 0.36 * len(rows)), layout="constrained")
    _draw(figure.subplots(), panel, rows, names=True)
    return _svg(figure)


def curves_svg(curves: list[Curve], rows: list[Row]) -> str:
    """The learning curves as SVG, one above the other."""
    count = 2 if _has_accuracy(curves) else 1
    figure = Figure(figsize=(4.4, 1 + 2.8 * count), layout="constrained")
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    _curves(axes, curves, rows)
    _legend(figure, axes[0], columns=2)
    return _svg(figure)


def _legend(figure: Figure, axis: Axes, columns: int = 4) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9,
            handlelength=3,
        )  # fmt: skip


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    # The same bytes each time: no date, and names by content.
    with matplotlib.rc_context({"svg.hashsalt": "metala-vision", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
