"""The learning curve of a run; how pictures look, and how they are written."""

import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .files import replacing

# Okabe and Ito's colours, which colour-blind readers tell apart too; without the pale yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^DvPX"
DASHES = ("-", "--", "-.", ":")


def style(index: int) -> dict[str, Any]:
    """Of the curve of that number: no two of 28 are alike, none of 7 in colour or marker."""
    count = len(COLORS)
    return {
        "color": COLORS[index % count], "marker": MARKERS[index % count],
        "linestyle": DASHES[index // count % len(DASHES)], "markersize": 5, "linewidth": 1.6,
    }  # fmt: skip


def learning_curve(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy over the optimizer steps, from the lines of metrics.jsonl, as a PNG."""
    train = [line for line in metrics if line["event"] == "train"]
    evals = [line for line in metrics if line["event"] == "eval"]
    # Drawn at every evaluation: a layout that is computed costs as much as the drawing.
    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.135, top=0.82, wspace=0.17)
    loss_axis, accuracy_axis = figure.subplots(1, 2)
    figure.suptitle(title)

    loss_axis.plot(
        [line["step"] for line in train], [line["loss"] for line in train], color="#0072b2",
        label="training",
    )  # fmt: skip
    steps = [line["step"] for line in evals]
    for axis, key, color, label in (
        (loss_axis, "loss", "#d55e00", "held out"),
        (accuracy_axis, "top5", "#009e73", "top-5"),
        (accuracy_axis, "top1", "#d55e00", "top-1"),
    ):
        values = [line[key] for line in evals]
        marker = "o" if len(evals) < 30 else ""
        axis.plot(steps, values, color=color, marker=marker, markersize=4, label=label)
        if axis is accuracy_axis and values:
            axis.annotate(
                f"{values[-1]:.1f}",
                (steps[-1], values[-1]),
                xytext=(0, 5 if key == "top5" else -13),
                ha="center",
                textcoords="offset points",
            )  # fmt: skip
    loss_axis.set(xlabel="step", ylabel="cross entropy", ylim=(0, None))
    accuracy_axis.set(xlabel="step", ylabel="held-out accuracy, %", ylim=(0, 105))
    last = max((line["step"] for line in [*train, *evals]), default=1)
    for axis in (loss_axis, accuracy_axis):
        axis.set_xlim(0, 1.05 * last)
        axis.grid(alpha=0.3)
        # Above the axes: no curve runs there.
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; a UserError where that cannot be."""
    with replacing(path) as fresh, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a user's names
        figure.savefig(fresh, dpi=130)
