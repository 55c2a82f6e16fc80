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

    steps = [line["step"] for line in train]
    loss_axis.plot(steps, [line["loss"] for line in train], color="#0072b2", label="training")
    eval_steps = [line["step"] for line in evals]
    marker = "o" if len(evals) < 30 else ""
    style = {"marker": marker, "markersize": 3.5}
    loss_axis.plot(
        eval_steps, [line["loss"] for line in evals], color="#d55e00", label="held out", **style
    )
    loss_axis.set(xlabel="step", ylabel="cross entropy", ylim=(0, None))

    for key, name, color in (("top1", "top-1", "#d55e00"), ("top5", "top-5", "#009e73")):
        values = [line[key] for line in evals]
        accuracy_axis.plot(eval_steps, values, color=color, label=name, **style)
    if evals:
        last = evals[-1]
        accuracy_axis.annotate(
            f"{last['top1']:.1f} %", (last["step"], last["top1"]), xytext=(-4, -14),
            textcoords="offset points", ha="right",
        )  # fmt: skip
    accuracy_axis.set(xlabel="step", ylabel="held-out accuracy, %", ylim=(0, 102))
    for axis, place in ((loss_axis, "upper right"), (accuracy_axis, "lower right")):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc=place)  # to look for the best one may take seconds
    _save(figure, path)
