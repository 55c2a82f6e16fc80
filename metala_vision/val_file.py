"""Held-out images that a file lists, one a line."""

from pathlib import Path

import numpy as np

from .errors import UserError
from .sources import Source


def held_out(path: Path, source: Source, where: str) -> tuple[list[int], list[int]]:
    """Indices of the images to train on and of those that the file holds out, both in order.

    A line is the key of an image, for class folders CLASS/name.jpg; "./" before it, blank lines,
    lines that begin with "#" and Windows' line ends are accepted.

    Args:
        path: of the file. where: what the source is called in an error.
    Raises:
        UserError: a file that cannot be read or names no image, a line that is no image or stands
            twice, a class without an image left to train on.
    """
    try:
        # Names of files need not be UTF-8; keys hold their bytes in the same way.
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read data.val_file {path}: {error.strerror}") from error
    index_of = {source.key(index): index for index in range(len(source))}
    line_of: dict[int, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip()
        if not line or line[0] == "#":
            continue
        key = line.removeprefix("./")
        index = index_of.get(key)
        if index is None:
            raise UserError(
                f"{path}, line {number}: {key!r:.200} is no image of {where}, which are as "
                f"{source.key(0)!r}"
            )
        if index in line_of:
            raise UserError(f"{path}, line {number}: {key!r} stands in line {line_of[index]} too")
        line_of[index] = number
    if not line_of:
        raise UserError(f"data.val_file {path} names no image")
    train = [index for index in range(len(source)) if index not in line_of]
    count = len(source.classes)
    left = np.bincount([source.targets[i] for i in train], minlength=count)
    all_of = np.bincount(source.targets, minlength=count)
    gone = np.flatnonzero((left == 0) & (all_of > 0))
    if len(gone):
        raise UserError(
            f"data.val_file {path} holds out each image of class {source.classes[gone[0]]!r}, "
            "none is left to train on"
        )
    return train, sorted(line_of)
