"""The picture of associative recall."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from metala_vision.plots import save, style

from .mqar_table import Row


def recall_picture(rows: list[Row], path: Path) -> None:
    """Accuracy over the widths, a panel for each length; of one width, over the mixers.

    Bars tell the 95 % interval, small points the seeds, hollow marks what the paper prints.

    Raises:
        UserError: for a file that cannot be written.
    """
    lengths = list(dict.fromkeys((row.length, row.pairs) for row in rows))
    mixers = list(dict.fromkeys(row.mixer for row in rows))
    over_dims = len({row.dim for row in rows}) > 1
    height = 4.2 if over_dims else 1.3 + 0.36 * len(mixers)
    width = 4.0 if over_dims else 6.4
    figure = Figure(figsize=(width * len(lengths) + 1.2, height), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axis, length in zip(panels, lengths, strict=True):
        own = [row for row in rows if (row.length, row.pairs) == length]
        title = f"length {length[0]}, {length[1]} pairs"
        if over_dims:
            _over_dims(axis, own, mixers)
        else:
            _over_mixers(axis, own, mixers, names=axis is panels[0])
            title += f", width {own[0].dim}"
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    if over_dims:
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False
        )
    save(figure, path)


def _over_mixers(axis: Axes, rows: list[Row], mixers: list[str], names: bool) -> None:
    for row in rows:
        place = mixers.index(row.mixer)
        color = style(place)["color"]
        seeds = row.accuracies
        axis.plot(seeds, [place] * len(seeds), linestyle="", marker="o", markersize=4, color=color,
                  alpha=0.5)  # fmt: skip
        axis.errorbar(
            row.accuracy.mean, place, xerr=row.accuracy.half_width, color=color,
            marker=style(place)["marker"], markersize=7, capsize=4,
        )  # fmt: skip
        if row.published is not None:
            printed = float(row.published.lstrip("> "))
            axis.plot(printed, place, marker="D", markersize=9, color=color, fillstyle="none")
        axis.annotate(
            f"{row.accuracy}  ({row.state_floats:,})", (1.02, place), va="center", fontsize=9,
            xycoords=axis.get_yaxis_transform(),
        )  # fmt: skip
    axis.annotate("% (state floats)", (1.02, -0.8), va="center", fontsize=8, color="#555555",
                  xycoords=axis.get_yaxis_transform(), annotation_clip=False)  # fmt: skip
    axis.set(xlim=(-3, 103), ylim=(len(mixers) - 0.4, -0.6), xlabel="test accuracy, %")
    axis.set_yticks(range(len(mixers)), mixers if names else [""] * len(mixers))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _over_dims(axis: Axes, rows: list[Row], mixers: list[str]) -> None:
    dims = sorted({row.dim for row in rows})
    for place, mixer in enumerate(mixers):
        own = sorted((row for row in rows if row.mixer == mixer), key=lambda row: row.dim)
        look = style(place)
        axis.errorbar(
            [row.dim for row in own], [row.accuracy.mean for row in own], label=mixer, capsize=3,
            yerr=[row.accuracy.half_width or 0.0 for row in own], **look,
        )  # fmt: skip
        printed = [(row.dim, float(row.published.lstrip("> "))) for row in own if row.published]
        for dim, value in printed:
            axis.plot(dim, value, marker="D", markersize=10, color=look["color"], fillstyle="none")
    axis.set_xscale("log")
    axis.set_xticks(dims, [str(dim) for dim in dims])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(ylim=(-3, 103), xlabel="width", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
