"""The picture of `metala-vision predict`."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metala_vision.files import evenly_spread
from metala_vision.labels import brief
from metala_vision.plots import save

from .classify import Guess, Prediction
from .images import printable, read_image

MOST = 60  # images of a picture
BARS = 5  # classes of an image
# Of a cell, in inches: the image, then its bars.
SIDE, WIDTH, HEIGHT, GAP, TOP = 1.2, 2.35, 1.25, 0.35, 0.45
SHARPEST = 240  # pixels of a shown image's side


def predictions(done: Sequence[Prediction], model: str, path: Path) -> None:
    """A grid of images with bars of their likeliest classes, MOST images evenly spread over all."""
    shown = evenly_spread(done, MOST)
    count = len(shown)
    columns = min(count, 1 if count == 1 else 2 if count <= 4 else 3)
    rows = -(-count // columns)
    width = columns * (SIDE + WIDTH + GAP) + GAP
    height = rows * (HEIGHT + GAP) + TOP + 0.1
    figure = Figure(figsize=(width, height))
    name = model if len(Path(model).parts) < 3 else "/".join(Path(model).parts[-2:])
    of_all = f"{count} of {len(done)} images" if count < len(done) else ""
    figure.text(
        GAP / width, 1 - 0.26 / height, f"{name}   {of_all}", fontsize=11, va="center",
        parse_math=False,
    )  # fmt: skip
    for i, prediction in enumerate(shown):
        row, column = divmod(i, columns)
        left = GAP + column * (SIDE + WIDTH + GAP)
        bottom = height - TOP - (row + 1) * (HEIGHT + GAP) + 0.1
        image = figure.add_axes((left / width, bottom / height, SIDE / width, HEIGHT / height))
        bars = figure.add_axes(
            ((left + SIDE + 0.08) / width, bottom / height, WIDTH / width, HEIGHT / height)
        )
        _show(image, prediction.image)
        _bars(bars, prediction.guesses)
    save(figure, path)


def _show(axis: Axes, path: Path) -> None:
    image = read_image(path, "RGB")
    image.thumbnail((SHARPEST, SHARPEST))
    axis.imshow(image)
    axis.set_axis_off()
    axis.set_anchor("NW")
    name = printable(Path(path.name))
    name = name if len(name) <= 44 else f"…{name[-43:]}"
    axis.set_title(name, fontsize=8, loc="left", pad=3, parse_math=False)


def _bars(axis: Axes, guesses: Sequence[Guess]) -> None:
    own = guesses[:BARS]
    values = [guess.probability for guess in own]
    axis.barh(range(len(own)), [1] * len(own), height=0.86, color="#f2f2f2")
    axis.barh(range(len(own)), values, height=0.86, color="#9ecbe8")
    for i, guess in enumerate(own):
        weight = "bold" if i == 0 else "normal"
        words = brief(guess.words, 27)
        axis.text(0.015, i, words, va="center", fontsize=8, fontweight=weight, parse_math=False)
        axis.text(0.985, i, f"{100 * guess.probability:.1f} %", va="center", ha="right", fontsize=8)
    axis.set(xlim=(0, 1), ylim=(BARS - 0.5, -0.5))
    axis.set_axis_off()
