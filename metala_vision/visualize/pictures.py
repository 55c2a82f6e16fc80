"""The pictures of `metala-vision visualize`."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from metala_vision.layers import ORDERS, scan_order
from metala_vision.plots import save

from .memory import LayerMemory

COLOURS = colormaps["viridis"].with_extremes(bad="#dddddd")


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
    save(figure, path)


def attention_maps(
    image: np.ndarray, models: list[dict[str, Any]], by_head: bool, path: Path
) -> None:
    """What one token takes from every other: a column for each layer, a row for each pass.

    Args:
        image: [height, width, C] in 0 to 1, as the first model sees it.
        models: each with model, untrained, grid, token, prefix_tokens and layers, a list of what
            visualize.layer_maps returns.
        by_head: a row for each head of each pass, instead of the heads' mean.
    """
    rows: list[tuple[dict[str, Any], str, list[tuple[int, np.ndarray | None]]]] = []
    for part in models:
        layers = part["layers"]
        names = list(dict.fromkeys(name for layer in layers for name in layer["relative"]))
        for name in names:
            own = [(layer["layer"], layer["relative_by_head"].get(name)) for layer in layers]
            arrays = [(i, None if w is None else np.asarray(w)) for i, w in own]
            heads = max(len(w) for _, w in arrays if w is not None)
            for h in range(heads) if by_head else [None]:
                taken = [
                    (i, None if w is None else w.mean(0) if h is None else w[h]) for i, w in arrays
                ]
                rows.append((part, name if h is None else f"{name}, head {h}", taken))
    columns = max(len(cells) for _, _, cells in rows)
    tall = min(2, len(rows))  # of the image, in panels
    side = max(1.5, 6.7 / (columns + tall))  # of a panel, inches
    size = (1.8 + side * (columns + tall), 0.8 + 0.4 * len(models) + side * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(rows), columns + 1, width_ratios=[tall] + [1] * columns)
    shown = figure.add_subplot(grid[:tall, 0])
    shown.imshow(image.squeeze(), cmap="gray" if image.shape[2] == 1 else None)
    Gh, Gw = models[0]["grid"]
    height, width = image.shape[:2]
    row, column = models[0]["token"]
    _box(shown, column * width / Gw - 0.5, row * height / Gh - 0.5, width / Gw, height / Gh)
    shown.set(xticks=[], yticks=[], title="the image, as the model\nsees it, and the token")
    every = np.concatenate(
        [cell.ravel() for *_, cells in rows for _, cell in cells if cell is not None]
    )
    # A square root, and the highest hundredth cut off: one peak would leave the rest in the dark.
    norm = PowerNorm(0.5, 0.0, max(float(np.quantile(every, 0.99)), 2.0))
    drawn, previous, axes = None, None, []
    for i, (part, label, cells) in enumerate(rows):
        for j, (layer, cell) in enumerate(cells):
            axis = figure.add_subplot(grid[i, j + 1])
            axes.append(axis)
            axis.set(xticks=[], yticks=[])
            if j == 0:
                axis.set_ylabel(label)
            if part is not previous:
                space = "\n" if j == 0 else ""
                axis.set_title(f"{space}layer {layer}", fontsize=10, loc="left")
                if j == 0:  # longer than a column is wide
                    name = _described(part)
                    fits = 72 * (side * columns + 0.7) / (0.65 * len(name))  # points, bold
                    text = axis.annotate(
                        name, (0, 1), xycoords="axes fraction", xytext=(0, 20),
                        textcoords="offset points", fontsize=min(10, fits), fontweight="bold",
                    )  # fmt: skip
                    text.set_in_layout(False)
            if cell is None:
                axis.set_axis_off()
                continue
            drawn = axis.imshow(np.ma.masked_equal(cell, 0.0), norm=norm, cmap=COLOURS)
            r, c = part["token"]
            _box(axis, c - 0.5, r - 0.5, 1, 1)
        previous = part
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.02, extend="max")
    of_heads = "" if by_head else "; mean of heads"
    bar.set_label(f"|weight|, 1 = as all tokens alike\n(square-root scale{of_heads})")
    figure.suptitle(f"What token ({row}, {column}) takes from every other   (grey: not heard)")
    save(figure, path)


def _described(part: dict[str, Any]) -> str:
    prefix = part["prefix_tokens"]
    left_out = f"; {prefix} prefix tokens left out" if prefix > 1 else ""
    left_out = "; class token left out" if prefix == 1 else left_out
    return f"{_short(part['model'])}{', untrained' if part['untrained'] else ''}{left_out}"


def _short(model: str) -> str:
    """A name, or the end of a folder's path."""
    parts = Path(model).parts
    return model if len(parts) < 3 else "/".join(parts[-2:])


def _box(axis: Any, x: float, y: float, width: float, height: float) -> None:
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="#d55e00", linewidth=1.8))


def receptive_field(
    field: np.ndarray, token: tuple[int, int], grid: tuple[int, int],
    squares: tuple[list[int], list[float], list[float]], held: dict[float, int], title: str,
    source: str, path: Path,
) -> None:  # fmt: skip
    """The field [height, width] on a logarithmic scale, and what growing squares hold of it.

    Args:
        squares: of receptive_field.growing_squares. held: the side that holds each share.
    """
    height, width = field.shape
    figure = Figure(figsize=(10.5, 4.7), layout="constrained")
    figure.suptitle(f"Effective receptive field of {_short(title)}, mean over {source}")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    relative = field / field.max()
    least = min(0.1, max(1e-6, float(np.quantile(relative[relative > 0], 0.02))))
    drawn = left.imshow(np.ma.masked_equal(relative, 0.0), norm=LogNorm(least, 1), cmap=COLOURS)
    h, w = height / grid[0], width / grid[1]
    _box(left, token[1] * w - 0.5, token[0] * h - 0.5, w, h)
    left.set(xlabel="pixel column", ylabel="pixel row",
             title=f"token ({token[0]}, {token[1]}) of {grid[0]} x {grid[1]}")  # fmt: skip
    bar = figure.colorbar(drawn, ax=left, extend="min", fraction=0.046)
    bar.set_label("|gradient| over its largest (grey: exactly 0)")
    sides, shares, areas = squares
    right.plot([0, *sides], [0, *(100 * s for s in shares)], color="#0072b2", label="gradient")
    right.plot([0, *sides], [0, *(100 * s for s in areas)], color="#999999", linestyle="--",
               label="area of the image")  # fmt: skip
    for (share, side), marker in zip(held.items(), "os^", strict=True):
        right.plot([side], [100 * shares[sides.index(side)]], marker, color="#d55e00", markersize=6,
                   label=f"{100 * share:g} % within {side} px")  # fmt: skip
    right.set(xlabel="side of the square around the token, pixels", ylabel="share within, %",
              xlim=(0, None), ylim=(0, 105), title="share within growing squares")  # fmt: skip
    right.grid(alpha=0.3)
    right.legend(loc="lower right", frameon=False)
    save(figure, path)


def memory(
    found: list[LayerMemory], grid: tuple[int, ...], title: str, source: str, path: Path
) -> None:
    """Half-lives by layer: the median and the band from 10 to 90 %, the median of each head."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axis = figure.subplots()
    figure.suptitle(f"Memory of {_short(title)} over {source}")
    low, high = 1e-2, 1e6
    decays = list(dict.fromkeys(own.decay for own in found))
    for decay, color, shift in zip(decays, ("#0072b2", "#d55e00"), (0.0, 0.08), strict=False):
        own = [layer for layer in found if layer.decay == decay]
        layers = np.array([layer.layer for layer in own]) + shift
        least, middle, most = np.clip(np.array([layer.quantiles for layer in own]).T, low, high)
        axis.fill_between(layers, least, most, color=color, alpha=0.2, linewidth=0)
        axis.vlines(layers, least, most, color=color, alpha=0.4, linewidth=1)
        name = f"{decay}: median, and 10 to 90 %"
        axis.plot(layers, middle, color=color, marker="o", markersize=5, label=name)
        for layer, of_layer in zip(layers, own, strict=True):
            if len(of_layer.heads) > 1:
                heads = np.clip(of_layer.heads, low, high)
                axis.plot([layer] * len(heads), heads, "_", color=color, markersize=11)
    if any(len(own.heads) > 1 for own in found):
        axis.plot([], [], "_", color="#333333", markersize=11, label="median of a head")
    for tokens, name in ((grid[1], "a row"), (grid[0] * grid[1], "the image")):
        axis.axhline(tokens, color="#333333", linestyle=":", linewidth=1)
        axis.annotate(
            f"{name},\n{tokens} tokens", (1, tokens), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    beyond = (
        "; above 1e6 drawn there" if max(x for own in found for x in own.quantiles) > high else ""
    )
    axis.set(xlabel="layer", ylabel=f"half-life, tokens along the scan{beyond}", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom, top = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 1000 * bottom else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    save(figure, path)
