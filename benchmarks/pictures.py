"""The pictures of measured results: kernels, whole models, a training step by part."""

from pathlib import Path

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from results import OK
from subjects import DEIT, FORMS, INFERENCE, SMALL, TRAINING

from metala_vision.plots import COLORS, save

OTHERS = ("#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#999999", "#000000", "#b8a800", "#882255",
          "#44aa99", "#aa4499", "#661100", "#6699cc")  # fmt: skip
NAMES = {DEIT: "DeiT-tiny", SMALL[1]: "DeiT-small"}


def operators(result: dict, path: Path) -> None:
    """Nanoseconds a token and head against N, one panel for forward, one with backward."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, backward in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        lengths = set()
        # Ours and softmax attention as in the other pictures.
        for form, i in zip(FORMS, (0, 2, 1, 5), strict=True):
            chosen = sorted(
                (r["N"], 1e6 * r["ms"] / (r["N"] * r["B"] * r["H"]))
                for r in result["rows"]
                if r["form"] == form and r["backward"] == backward and r.get("ms")
            )
            if chosen:
                axis.plot(*zip(*chosen, strict=True), "o-", color=COLORS[i], label=form, ms=4)
                lengths |= {N for N, _ in chosen}
        axis.set(xscale="log", yscale="log", xlabel="tokens N")
        axis.set_xticks(sorted(lengths), [str(N) for N in sorted(lengths)])
        axis.minorticks_off()
        axis.set_title("forward and backward" if backward else "forward")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nanoseconds per token and head")
    for axis in figure.axes:  # either may be empty
        if axis.lines:
            axis.legend(frameon=False)
            break
    figure.suptitle(f"{result['device']}, {result['dtype']}, K 32, V 64")
    save(figure, path)


def models(result: dict, path: Path) -> None:
    """Images a second of training and of inference, and memory, against the size of the image."""
    rows = [row for row in result["rows"] if row.get("status", OK) == OK]
    ways = {row["compiled"] for row in rows}
    rows = [row for row in rows if row["compiled"] == (True in ways)]
    names = sorted({row["model"] for row in rows}, key=lambda n: (_place(n), n))
    others = [name for name in names if _place(name) == 2]
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels = (
        (TRAINING, "images_s", "images a second"),
        (INFERENCE, "images_s", "images a second"),
        (TRAINING, "peak_mib", "peak MiB an image"),
    )
    for axis, (what, key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        sizes = set()
        for name in names:
            chosen = sorted(
                (r["size"], r[key] / (r["batch"] if key == "peak_mib" else 1))
                for r in rows
                if r["model"] == name and r["what"] == what and r.get(key)
            )
            if chosen:
                main = _place(name) < 2
                palette, number = (COLORS, _place(name)) if main else (OTHERS, others.index(name))
                color = palette[number % len(palette)]
                style = {"lw": 2.0, "ms": 5, "zorder": 3} if main else {"lw": 1.0, "ms": 3}
                line = "o--" if "small" in name else "o-"
                axis.plot(*zip(*chosen, strict=True), line, color=color, label=name, **style)
                sizes |= {size for size, _ in chosen}
        axis.set(xscale="log", yscale="log", xlabel="pixels a side", ylabel=label, title=what)
        if sizes:
            axis.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    named = [NAMES.get(label, label) for label in labels]
    if handles:
        figure.legend(handles, named, loc="outside right center", frameon=False, fontsize=8,
                      handlelength=3.5)  # fmt: skip
    way = "compiled" if True in ways else "eager"
    figure.suptitle(f"{result['device']}, {result['dtype']}, {way}, torch "
                    f"{result['versions']['torch']}")  # fmt: skip
    save(figure, path)


def step(result: dict, path: Path) -> None:
    """Stacked horizontal bars: each a phase of a training step, by part or by kind of kernel."""
    bars = [row for row in result["rows"] if row.get("status", OK) == OK]
    names: list[str] = []
    for row in bars:
        names += [name for name in row["parts"] if name not in names]
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(bars) + 0.06 * len(names)), layout="constrained")
    axis = figure.subplots()
    palette = matplotlib.colormaps["tab20"].colors
    colors = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    whole = max((sum(bar["parts"].values()) + bar["idle"] for bar in bars), default=0.0)
    for i, row in enumerate(bars):
        left = 0.0
        for name in names:
            ms = row["parts"].get(name, 0.0)
            axis.barh(i, ms, left=left, color=colors[name], edgecolor="white", lw=0.5)
            if ms > 0.045 * whole:
                text = f"{ms:.1f}" if ms >= 1 else f"{ms:.2f}"
                dark = sum(to_rgb(colors[name])) < 1.3
                axis.text(left + ms / 2, i, text, ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
            left += ms
        axis.barh(i, row["idle"], left=left, color="none", edgecolor="#bbbbbb", hatch="////", lw=0)
    axis.set_yticks(range(len(bars)), [row["phase"] for row in bars])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds; hatched: no kernel runs" if result["gpu"] else
                    "milliseconds; hatched: between the operations")  # fmt: skip
    handles = [axis.barh([0], [0], color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    axis.set_title(f"a training step of {result['model']}, batch {result['batch']} at "
                   f"{result['size']} px, {result['device']}", fontsize=10)  # fmt: skip
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    save(figure, path)


def _place(name: str) -> int:
    """Ours first, then DeiT, then the others."""
    return 0 if name.startswith("metala") else 1 if name.startswith("deit") else 2
