"""Images inside archives: tar files, WebDataset shards, data sets of the Hugging Face hub.

timm's readers index tar files and open hub data sets. Shards are indexed here: timm's reader
streams them, and a stream has no sample number n of epoch e to resume at.
"""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import OwnError, UnreadableImage, UserError, one_line
from .sources import decode

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
LABEL_KEY = "cls"
OPEN_FILES = 128  # of a process


class TarSource:
    """Images at known places of uncompressed tar files.

    Reads name their place in the file, so that forked workers may share it.

    Args:
        files: the archives.
        places: (file, first byte, bytes) of each image, int64 [images, 3].
        keys: name of each image inside its archive.
        targets, classes: as Source has them.
    """

    def __init__(
        self, files: list[Path], places: np.ndarray, keys: list[str], targets: list[int],
        classes: list[str],
    ) -> None:  # fmt: skip
        self.files, self.places, self.keys = files, places, keys
        self.targets, self.classes = targets, classes
        self.opened: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": OrderedDict()}

    def image(self, index: int) -> Image.Image:
        number, first, length = map(int, self.places[index])
        file = self._open(number)
        try:
            content = os.pread(file, length, first)
        except OSError as error:
            name = self.name(index)
            raise UnreadableImage(f"cannot read image {name}: {one_line(error)}") from error
        return decode(BytesIO(content), self.name(index))

    def _open(self, number: int) -> int:
        """The archive's descriptor; the one used longest ago is closed where there are too many."""
        if number in self.opened:
            self.opened.move_to_end(number)
            return self.opened[number]
        while len(self.opened) >= OPEN_FILES:
            os.close(self.opened.popitem(last=False)[1])
        try:
            self.opened[number] = os.open(self.files[number], os.O_RDONLY)
        except OSError as error:  # not one image but all of an archive
            raise OwnError(f"cannot open {self.files[number]}: {error.strerror}") from error
        return self.opened[number]

    def name(self, index: int) -> str:
        return f"{self.files[int(self.places[index][0])]}:{self.keys[index]}"

    def key(self, index: int) -> str:
        return f"{self.files[int(self.places[index][0])].name}:{self.keys[index]}"


def _check_plain(files: Sequence[Path]) -> None:
    for file in files:
        try:
            tarfile.open(file, "r:").close()
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"cannot read {file} as an uncompressed tar: {error}") from error


def read_tar(path: Path, classes: list[str] | None = None) -> TarSource:
    """A tar of class folders, or a folder of tars named by class, as timm's reader indexes them.

    Raises:
        UserError: no tar, no image, one that is damaged, or a class that is not in `classes`.
    """
    from timm.data.readers.reader_image_in_tar import extract_tarinfos

    _check_plain([path] if path.is_file() else sorted(path.glob("*.tar")))
    try:
        # Its cache would be a file beside the data.
        found: Any = extract_tarinfos(str(path), cache_tarinfo=False)
    except (AssertionError, OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"cannot read {path}: {one_line(error) or 'no images'}") from error
    members, numbered, labels, _ = found
    word_of = {number: word for word, number in labels.items()}
    folder, single = (path.parent, path.name) if path.is_file() else (path, "")
    samples = sorted(
        # A tar inside a tar counts from its own beginning. timm's order follows the directory's.
        (name or single, m.offset_data + (inner.offset_data if inner else 0), m.size,
         f"{inner.name}/{m.name}" if inner else m.name, word_of[int(number)])
        for (m, name, inner), number in zip(members, numbered, strict=True)
        if not _is_hidden(m.name)
    )  # fmt: skip
    if not samples:
        raise UserError(f"no images in {path}")
    own = sorted({word for *_, word in samples}, key=labels.__getitem__)
    unknown = sorted(set(own) - set(classes or own))
    if unknown:
        raise UserError(f"{path} has class {unknown[0]!r}, which the training images lack")
    classes = classes or own
    names = sorted({name for name, *_ in samples})
    number_of = {name: i for i, name in enumerate(names)}
    label_of = {word: i for i, word in enumerate(classes)}
    return TarSource(
        [folder / name for name in names],
        np.array([(number_of[name], first, size) for name, first, size, *_ in samples]),
        [key for *_, key, _ in samples],
        [label_of[word] for *_, word in samples],
        classes,
    )


def _is_hidden(name: str) -> bool:
    """What a Mac puts beside a file, and hidden folders."""
    parts = [part for part in name.split("/") if part not in (".", "")]
    return any(part[0] == "." or part == "__MACOSX" for part in parts)


def read_shards(
    files: list[Path],
    classes: list[str] | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
) -> TarSource:
    """WebDataset shards: members KEY.jpg and KEY.cls are one sample.

    A label is a number, or the name of a class; names are numbered in alphabetical order.

    Args:
        files: the shards.
        classes: of the training images, which the labels must be among.
        input_key: endings of an image, separated by ";"; default jpg;jpeg;png;webp.
        target_key: ending of a label; default cls.
    Raises:
        UserError: a shard that is damaged or compressed, an image without a label, no image.
    """
    inputs = tuple((input_key or ";".join(IMAGE_KEYS)).lower().split(";"))
    label_key = (target_key or LABEL_KEY).lower()
    places, keys, labels = [], [], []
    _check_plain(files)
    for number, path in enumerate(files):
        images: dict[str, tuple[int, int, int]] = {}
        words: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if _is_hidden(member.name):
                        continue
                    if ending.lower() in inputs and (member.issym() or member.islnk()):
                        raise UserError(f"{path}: {member.name} is a link; shards hold files")
                    if not member.isfile():
                        continue
                    if ending.lower() in inputs:
                        images[key] = (number, member.offset_data, member.size)
                    elif ending.lower() == label_key:
                        content: Any = shard.extractfile(member)
                        words[key] = content.read(4096).decode(errors="replace").strip()
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"cannot read shard {path}: {one_line(error)}") from error
        for key, place in images.items():
            if key not in words:
                raise UserError(f"{path}: image {key} has no label {key}.{label_key}")
            places.append(place)
            keys.append(key)
            labels.append(words[key])
    where = files[0].parent if files else "the shards"
    if not labels:
        raise UserError(f"no images in {where}: members that end in {', '.join(inputs)} are read")
    named = classes is not None and set(labels) <= set(classes)
    if not named and all(word.isdecimal() for word in labels):
        count = max(map(int, labels)) + 1
        if classes is not None and count > len(classes):
            raise UserError(f"{where} has label {count - 1}, the training images {len(classes)}")
        classes = classes or [str(i) for i in range(count)]
        targets = [int(word) for word in labels]
    else:
        unknown = sorted(set(labels) - set(classes or labels))
        if unknown:
            raise UserError(f"{where} has class {unknown[0]!r}, which the training images lack")
        classes = classes or sorted(set(labels))
        number_of = {name: i for i, name in enumerate(classes)}
        targets = [number_of[word] for word in labels]
    return TarSource(files, np.array(places), keys, targets, classes)


class HubSource:
    """A split of a data set that the `datasets` library loads, by timm's reader.

    Args:
        name: of the hub, or a local folder of parquet, arrow or image files.
        split: "train", "validation", ...
        input_key, target_key: columns; default image, label.
    Raises:
        UserError: `datasets` is missing, or cannot load it.
    """

    def __init__(
        self, name: str, split: str, input_key: str | None = None, target_key: str | None = None
    ) -> None:
        try:
            import datasets  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError("data.dataset='hfds' needs datasets: pip install datasets") from error
        from timm.data.readers.reader_hfds import ReaderHfds

        keys: dict[str, Any] = {"input_key": input_key, "target_key": target_key}
        self.origin = f"{name}[{split}]"
        try:
            self.reader = ReaderHfds(name, split=split, **{k: v for k, v in keys.items() if v})
            labels: Any = self.reader.class_to_idx
            found: Any = self.reader.iter_targets()
            self.targets = [int(label) for label in found]
            # A column of plain numbers names no classes.
            labels = labels or {str(i): i for i in range(max(self.targets) + 1)}
            self.classes = sorted(labels, key=labels.__getitem__)
            if min(self.targets) < 0:
                raise UserError(f"{self.origin} has images without a label")
        except UserError:
            raise
        except Exception as error:  # of a library that loads from anywhere
            reason = one_line(error) or type(error).__name__
            raise UserError(f"cannot load {self.origin}: {reason}") from error

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        try:
            file: Any = self.reader[index][0]
        except Exception as error:  # a damaged row makes the library raise anything
            name = self.name(index)
            raise UnreadableImage(f"cannot read image {name}: {one_line(error)}") from error
        with file:
            return decode(file, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.origin}:{index}"

    def key(self, index: int) -> str:
        return str(index)
