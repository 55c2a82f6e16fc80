"""Data sets as their authors publish them, and as torchvision.datasets reads them.

CIFAR-10 and 100, Oxford 102 Flowers, Oxford-IIIT Pets: the folder that the authors' archive unpacks
to, or the folder that contains it. Nothing is downloaded.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from .errors import UserError, one_line
from .pickled_arrays import read_pickle
from .sources import Source, decode, listed

FLOWER_NAMES = "cat_to_name.json"  # as it is passed on beside the flowers: {"1": "pink primrose"}


@dataclass(frozen=True)
class Published:
    """A data set of the catalogue.

    title: as its authors write it. page: where they publish it.
    folder: that holds the files; theirs, or torchvision's name where their archive has none.
    layout: what lies there, for an error.
    parts: names of the parts that the authors made. aliases: other names of parts.
    held_out: parts for evaluation; the first that is not trained on is the default.
    read: the images of some parts, in the authors' order.
    """

    title: str
    page: str
    folder: str
    layout: str
    parts: tuple[str, ...]
    held_out: tuple[str, ...]
    read: "Reader"
    aliases: dict[str, str] = field(default_factory=dict)

    def find(self, root: Path) -> Path:
        """The folder of the files: the one in root, or root itself."""
        return root / self.folder if (root / self.folder).is_dir() else root

    def require(self, folder: Path, name: str) -> Path:
        """That file or folder; UserError where it is missing."""
        if not (folder / name).exists():
            raise self.incomplete(folder, name)
        return folder / name

    def incomplete(self, folder: Path, name: str) -> UserError:
        """What to tell the user where something is missing."""
        return UserError(
            f"{folder} has no {name}, it holds {listed(folder)}; {self.title} is a "
            f"folder such as {self.folder}/ with {self.layout}, published at {self.page}"
        )

    def chosen(self, key: str, text: str) -> list[str]:
        """The parts that data.train_split or data.val_split names, such as train+val.

        Raises:
            UserError: an unknown part, or one that stands there twice.
        """
        names = self.aliases.get(text, text).split("+")
        if not set(names) <= set(self.parts) or len(set(names)) < len(names):
            raise UserError(
                f"data.{key}={text!r}: {self.title} has the parts {', '.join(self.parts)}; "
                f"several are written as {'+'.join(self.parts[:2])}"
            )
        return names

    def chosen_beside(self, train: list[str], text: str | None) -> list[str]:
        """The parts to hold out beside those to train on; None is the first of `held_out`.

        Raises:
            UserError: an unknown part, one that is trained on, none that is left.
        """
        if text is None:
            left = [name for name in self.held_out if name not in train]
            if not left:
                raise UserError(
                    f"data.train_split={'+'.join(train)} leaves none of the parts "
                    f"{', '.join(self.held_out)} to hold out; name one as data.val_split"
                )
            return left[:1]
        names = self.chosen("val_split", text)
        shared = [name for name in names if name in train]
        if shared:
            raise UserError(
                f"data.train_split={'+'.join(train)} and val_split={text} share {shared[0]}"
            )
        return names


class Reader(Protocol):
    def __call__(
        self, folder: Path, parts: Sequence[str], of: Published, classes: list[str] | None
    ) -> Source:
        """classes: of the training images, which the labels must be among."""
        ...


class ArraySource:
    """Small images in memory.

    Workers that are forked share the pixels, which nobody writes to.

    Args:
        pixels: uint8 [images, 3, height, width].
        keys, targets, classes: as Source has them.
    """

    def __init__(
        self, pixels: np.ndarray, keys: list[str], targets: list[int], classes: list[str]
    ) -> None:
        self.pixels, self.keys, self.targets, self.classes = pixels, keys, targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))

    def name(self, index: int) -> str:
        return f"image {self.keys[index]}"

    def key(self, index: int) -> str:
        return self.keys[index]


class FileSource:
    """Image files that a list names.

    Args:
        root: that the names are relative to.
        files: "jpg/image_00001.jpg" and so on; they are the keys.
        targets, classes: as Source has them.
    """

    def __init__(
        self, root: Path, files: list[str], targets: list[int], classes: list[str]
    ) -> None:
        self.root, self.files, self.targets, self.classes = root, files, targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        return decode(self.root / self.files[index], self.name(index))

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def key(self, index: int) -> str:
        return self.files[index]


def _read_cifar(
    folder: Path, parts: Sequence[str], of: Published, classes: list[str] | None,
    files: dict[str, list[str]], meta: str, prefix: str,
) -> ArraySource:  # fmt: skip
    """Batches of 32x32 images.

    Args:
        files: of each part. meta: the file of the names. prefix: of the keys, "fine_" or none.
    """
    path = of.require(folder, meta)
    classes = read_pickle(path).get(f"{prefix}label_names")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path} lacks {prefix}label_names, a list of names")
    arrays: list[np.ndarray] = []
    keys, targets = [], []
    for part in parts:
        before = len(targets)
        for name in files[part]:
            pixels, labels = _cifar_batch(of.require(folder, name), f"{prefix}labels", len(classes))
            arrays.append(pixels)
            targets += labels
        keys += [f"{part}/{i}" for i in range(len(targets) - before)]
    pixels = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return ArraySource(pixels.reshape(-1, 3, 32, 32), keys, targets, classes)


def _cifar_batch(path: Path, key: str, num_classes: int) -> tuple[np.ndarray, list[int]]:
    """uint8 [images, 3072], colour by colour, and the labels."""
    held = read_pickle(path)
    data, labels = held.get("data"), held.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        is_array = isinstance(data, np.ndarray)
        what = f"{data.dtype} {list(data.shape)}" if is_array else type(data).__name__
        raise UserError(f"{path}: data must be uint8 [images, 3072], it is {what}")
    if not isinstance(labels, list) or len(labels) != len(data):
        count = len(labels) if isinstance(labels, list) else "no"
        raise UserError(f"{path} has {len(data)} images and {count} {key}")
    wrong = [x for x in labels if type(x) is not int or not 0 <= x < num_classes]
    if wrong:
        raise UserError(f"{path} has label {wrong[0]!r:.40}; 0 to {num_classes - 1} are accepted")
    return data, labels


def _read_mat(path: Path, key: str) -> np.ndarray:
    """A row of whole numbers of a MATLAB file, int64."""
    from scipy.io import loadmat

    try:
        values = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=[key])[key])
    except KeyError as error:
        raise UserError(f"{path} has no variable {key}") from error
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"cannot read {path}: {one_line(error) or type(error).__name__}") from error
    numbers = values.ndim == 1 and values.dtype.kind in "uif" and np.isfinite(values).all()
    if not numbers or (values != np.floor(values)).any():
        raise UserError(f"{path}: {key} must be a row of whole numbers")
    return values.astype(np.int64)


def _read_flowers(
    folder: Path, parts: Sequence[str], of: Published, classes: list[str] | None
) -> FileSource:
    """Classes are called 1, 2, ..., unless FLOWER_NAMES names them: the authors' files do not."""
    path, sets = of.require(folder, "imagelabels.mat"), of.require(folder, "setid.mat")
    labels = _read_mat(path, "labels")
    count = int(labels.max(initial=0))
    if set(labels.tolist()) != set(range(1, count + 1)):
        raise UserError(f"{path}: labels must be the numbers from 1 on, each of some image")
    classes = [str(number) for number in range(1, count + 1)]
    if (folder / FLOWER_NAMES).exists():
        classes = _flower_names(folder / FLOWER_NAMES, classes)
    variable = {"train": "trnid", "val": "valid", "test": "tstid"}
    numbers = np.concatenate([_read_mat(sets, variable[part]) for part in parts])
    wrong = numbers[(numbers < 1) | (numbers > len(labels))]
    if len(wrong):
        raise UserError(f"{sets} names image {wrong[0]}, {path} has {len(labels)} labels")
    files = [f"jpg/image_{number:05d}.jpg" for number in numbers]
    _check_files(folder, "jpg", files, of)
    return FileSource(folder, files, (labels[numbers - 1] - 1).tolist(), classes)


def _flower_names(path: Path, numbers: list[str]) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        found = [names[number] for number in numbers]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"cannot read {path} as names of the classes 1 to {len(numbers)}: {one_line(error)}"
        ) from error
    if not all(isinstance(name, str) for name in found) or len(set(found)) < len(found):
        raise UserError(f"{path} must give each of 1 to {len(numbers)} a name of its own")
    return found


def _read_pets(
    folder: Path, parts: Sequence[str], of: Published, classes: list[str] | None
) -> FileSource:
    """Lines `NAME_123 CLASS SPECIES BREED`; the class is called NAME, as Abyssinian."""
    files, targets = [], []
    names = dict(enumerate(classes or (), 1))
    for part in parts:
        path = of.require(folder, f"annotations/{part}.txt")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}") from error
        for place, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            found = re.fullmatch(r"(([^/\s]+)_\d+)\s+([1-9]\d{0,5})(\s+\d+)*\s*", line)
            if not found:
                raise UserError(f"{path}, line {place}: {line!r:.60} is no NAME_123 CLASS 1 1")
            stem, name, number = found[1], found[2], int(found[3])
            if classes is not None and number not in names:
                raise UserError(f"{path} has class {name!r}, which the training images lack")
            if names.setdefault(number, name) != name:
                raise UserError(
                    f"{path}, line {place}: class {number} is {name!r}, before it was "
                    f"{names[number]!r}"
                )
            files.append(f"images/{stem}.jpg")
            targets.append(number - 1)
    where = f"{' and '.join(f'{part}.txt' for part in parts)} of {folder / 'annotations'}"
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{where}: of the classes 1 to {max(names)} some have no image")
    if len(set(names.values())) < len(names):
        raise UserError(f"{where}: two classes have the same name")
    _check_files(folder, "images", files, of)
    return FileSource(folder, files, targets, [names[number] for number in sorted(names)])


def _check_files(folder: Path, name: str, files: list[str], of: Published) -> None:
    held = {f"{name}/{path.name}" for path in of.require(folder, name).iterdir()}
    missing = [file for file in files if file not in held]
    if missing:
        more = f" ({len(missing)} of {len(files)} images are missing)" if missing[1:] else ""
        raise of.incomplete(folder, missing[0] + more)


CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CATALOGUE = {
    "cifar10": Published(
        title="CIFAR-10",
        page=CIFAR_PAGE,
        folder="cifar-10-batches-py",
        layout="data_batch_1 to data_batch_5, test_batch and batches.meta, the Python version",
        parts=("train", "test"),
        held_out=("test",),
        read=partial(
            _read_cifar,
            files={"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
            meta="batches.meta",
            prefix="",
        ),
    ),
    "cifar100": Published(
        title="CIFAR-100",
        page=CIFAR_PAGE,
        folder="cifar-100-python",
        layout="train, test and meta, the Python version",
        parts=("train", "test"),
        held_out=("test",),
        read=partial(
            _read_cifar,
            files={"train": ["train"], "test": ["test"]},
            meta="meta",
            prefix="fine_",
        ),
    ),
    "flowers102": Published(
        title="Oxford 102 Flowers",
        page="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        folder="flowers-102",
        layout="jpg/image_00001.jpg and so on, imagelabels.mat and setid.mat",
        parts=("train", "val", "test"),
        held_out=("val", "test"),
        read=_read_flowers,
        aliases={"trainval": "train+val"},
    ),
    "oxford_pets": Published(
        title="Oxford-IIIT Pets",
        page="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        folder="oxford-iiit-pet",
        layout="images/NAME_123.jpg and so on, annotations/trainval.txt and annotations/test.txt",
        parts=("trainval", "test"),
        held_out=("test",),
        read=_read_pets,
        aliases={"train": "trainval"},
    ),
}
