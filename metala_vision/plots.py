"""Pictures: of a run, of the scan orders."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metala_vision.layers import ORDERS, scan_order

from .errors import UserError


def scan_orders(Gh: int, Gw: int, path: Path) -> None:
    """Every scan order on a Gh x Gw grid, as a path from its first token (dot), in one PNG."""
    names = [*ORDERS[:-1], f"window({max(2, min(Gh, Gw) // 4)})"]
    figure = Figure(figsize=(11, 1.2 + 5.2 * min(2.0, Gh / Gw)), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    for axis, name in zip(axes, names, strict=True):
        order = scan_order(name, Gh, Gw)
        rows, columns = (order // Gw).tolist(), (order % Gw).tolist()
        axis.scatter(columns, rows, s=9, c=range(len(rows)), cmap="viridis", zorder=2)
        axis.plot(columns, rows, color="#888888", linewidth=0.8, zorder=1)
        axis.scatter(columns[:1], rows[:1], s=45, color="#d55e00", zorder=3)
        axis.set(title=name, aspect="equal", xlim=(-1, Gw), ylim=(Gh, -1), xticks=[], yticks=[])
    figure.suptitle(f"Scan orders on a {Gh} x {Gw} grid of tokens: dark to light, from the dot")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def learning_curve(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy over the optimizer steps, from the lines of metrics.jsonl, as a PNG."""
    train = [line for line in metrics if line["event"] == "train"]
    evals = [line for line in metrics if line["event"] == "eval"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
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
    _save(figure, path)
