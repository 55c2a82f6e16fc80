"""Where images come from: class folders, or the digits of scikit-learn; archives.py and
catalogue.py have more.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from .errors import UnreadableImage, UserError, one_line

_ENDINGS = f"endings read: {' '.join(IMG_EXTENSIONS)}"


class Source(Protocol):
    """Labelled images by index."""

    classes: list[str]
    targets: list[int]

    def image(self, index: int) -> Image.Image:
        """The decoded image; raises UnreadableImage naming it where that fails."""
        ...

    def name(self, index: int) -> str:
        """What a report calls the image."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def key(self, index: int) -> str:
        """What names the image wherever the data lies."""
        ...


def fingerprint(source: Source) -> str:
    """sha256 of the classes, and of each image's key and label: the same for the same data set."""
    seen = hashlib.sha256(json.dumps(source.classes).encode())
    for index, label in enumerate(source.targets):
        seen.update(f"\n{label} {source.key(index)}".encode(errors="surrogateescape"))
    return seen.hexdigest()


def listed(folder: Path) -> str:
    """What lies in a folder, for an error; or "nothing"."""
    found = sorted(p.name for p in folder.iterdir())
    return ", ".join(found[:5]) + (" ..." if len(found) > 5 else "") if found else "nothing"


def decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """The image of a file, read whole; raises UnreadableImage naming it where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields that do not matter, image after image
            with Image.open(file) as image:
                image.load()
                return image
    except Exception as error:  # a damaged file makes a decoder raise anything
        raise UnreadableImage(f"cannot read image {name}: {one_line(error)}") from error


class FolderSource:
    """A tree of class folders: root/CLASS/.../image, hidden folders left out.

    The class is the first folder, as in torchvision's ImageFolder (timm's reader takes the last).

    Args:
        root: holds one folder per class.
        classes: names that define the labels; None takes the folders in alphabetical order.
        skip_unknown: leave out the folders that are not in `classes`, instead of refusing them;
            `skipped` names them.
    Raises:
        UserError: no class folder, no image, a class without an image, or one not in `classes`.
    """

    def __init__(
        self, root: Path, classes: list[str] | None = None, skip_unknown: bool = False
    ) -> None:
        self.root = root
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
        if not folders:
            raise UserError(f"{root} has no class folders")
        unknown = sorted(set(folders) - set(classes or folders))
        if unknown and not skip_unknown:
            raise UserError(f"{root} has class {unknown[0]!r}, which the training images lack")
        self.skipped = unknown
        folders = [name for name in folders if name not in set(unknown)]
        self.classes = classes or folders
        labels = {name: i for i, name in enumerate(self.classes)}
        self.samples = make_dataset(str(root), labels, IMG_EXTENSIONS, allow_empty=True)
        self.targets = [label for _, label in self.samples]
        if not self.samples:
            raise UserError(f"no images in the class folders of {root}; {_ENDINGS}")
        missing = sorted(set(range(len(folders))) - set(self.targets)) if classes is None else []
        if missing:
            raise UserError(f"no image in class folder {root / folders[missing[0]]}; {_ENDINGS}")

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        return decode(Path(self.samples[index][0]), self.name(index))

    def name(self, index: int) -> str:
        return str(self.samples[index][0])

    def key(self, index: int) -> str:
        # A million of them: pathlib takes seconds.
        return str(self.samples[index][0])[len(str(self.root)) + 1 :]


class ClassRange:
    """The images of some classes, those from `low` to `high` - 1, which get the labels from 0 on.

    Raises:
        UserError: where there are fewer classes, or no image of theirs.
    """

    def __init__(self, source: Source, low: int, high: int) -> None:
        if high > len(source.classes):
            raise UserError(
                f"data.class_range={low} {high}: there are {len(source.classes)} classes"
            )
        self.source = source
        self.classes = source.classes[low:high]
        self.indices = [i for i, label in enumerate(source.targets) if low <= label < high]
        self.targets = [source.targets[i] - low for i in self.indices]
        if not self.indices:
            raise UserError(f"data.class_range={low} {high}: no image of these classes")

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        return self.source.image(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])


class DigitsSource:
    """The 1,797 handwritten digits, 8x8 grey, that scikit-learn carries (UCI, 43 writers)."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # two seconds, which few runs need

        digits: Any = load_digits()
        self.images = (digits.images * (255 / 16)).round().astype(np.uint8)
        self.classes = [str(name) for name in digits.target_names]
        self.targets = digits.target.tolist()

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return f"digit {index}"

    key = name


def read_image(source: Source, index: int, mode: str) -> Image.Image:
    """An image of a source as "RGB" or "L"; raises UnreadableImage."""
    image = source.image(index)
    try:
        return convert(image, mode)
    except ValueError as error:  # of a rare kind of pixel
        name = source.name(index)
        raise UnreadableImage(f"cannot read image {name}: {one_line(error)}") from error


def convert(image: Image.Image, mode: str) -> Image.Image:
    """The image as "RGB" or "L"; 16-bit grey is scaled, where Pillow would cut it off at 255."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert(mode)
