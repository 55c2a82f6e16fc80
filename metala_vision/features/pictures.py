"""The picture of `metala-vision features`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metala_vision.labels import brief, describe
from metala_vision.plots import save
from metala_vision.sources import convert

from .extract import Part
from .judge import neighbours

QUERIES, NEAREST = 10, 8
SIDE, GAP, TOP = 1.15, 0.12, 0.75  # of an image, inches
RIGHT, WRONG = "#009e73", "#cc3311"  # told apart by dashes too
SHARPEST = 240  # pixels of a shown image's side


def nearest(train: Part, val: Part, model: str, path: Path) -> None:
    """Held-out images, evenly spread, each with the training images nearest to it."""
    count, most = min(QUERIES, len(val.labels)), min(NEAREST, len(train.labels))
    order = np.argsort(val.labels, kind="stable")
    first = np.unique(val.labels[order], return_index=True)[1]
    if len(first) >= count:  # of as many classes as are shown
        order = order[first]
    queries = [int(order[i * len(order) // count]) for i in range(count)]
    similarities, found = neighbours(train.features, val.features[queries], most)
    names = _words(train.source.classes)
    step, line = SIDE + GAP, SIDE + 0.32
    width, height = (most + 1) * step + 3 * GAP, count * line + TOP
    figure = Figure(figsize=(width, height))
    titled = model if len(Path(model).parts) < 3 else "/".join(Path(model).parts[-2:])
    figure.text(
        GAP / width, 1 - 0.22 / height, f"{titled}: held-out images and their nearest training "
        "images", fontsize=11, va="center", parse_math=False,
    )  # fmt: skip
    figure.text(
        GAP / width, 1 - 0.45 / height, "frames: solid green, the same class; dashed red, another; "
        "numbers: cosine similarity", fontsize=8, va="center", color="#555555",
    )  # fmt: skip
    for row, query in enumerate(queries):
        bottom = height - TOP - row * line - SIDE
        for column in range(most + 1):
            left = GAP + column * step + (2 * GAP if column else 0)
            where = (left / width, bottom / height, SIDE / width, SIDE / height)
            axis = figure.add_axes(where)
            if column == 0:
                _show(axis, val, query, names, "#333333", "-", "")
                continue
            own = int(found[row, column - 1])
            right = train.labels[own] == val.labels[query]
            _show(
                axis, train, own, names, RIGHT if right else WRONG, "-" if right else (0, (4, 2)),
                f"{similarities[row, column - 1]:.2f}",
            )  # fmt: skip
    save(figure, path)


def _words(classes: Sequence[str]) -> list[str]:
    known = describe(classes)
    return [known.get(name, name) for name in classes]


def _show(
    axis: Axes, part: Part, position: int, names: list[str], color: str, dashes: object, note: str
) -> None:  # fmt: skip
    image = part.source.image(part.indices[position])
    image = convert(image, "RGB")
    image.thumbnail((SHARPEST, SHARPEST))
    axis.imshow(image, aspect="equal")
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set(color=color, linewidth=2.5, linestyle=dashes)
    words = brief(names[int(part.labels[position])], 19 if not note else 15)
    weight = "normal" if note else "bold"
    axis.set_title(
        f"{words} · {note}" if note else words,
        fontsize=7,
        pad=4,
        fontweight=weight,
        parse_math=False,
    )
