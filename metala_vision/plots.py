"""Pictures of a run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .errors import UserError


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
    for axis in (loss_axis, accuracy_axis):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
