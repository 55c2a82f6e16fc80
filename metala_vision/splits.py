"""Which images are for training and which are held out."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .archives import HubSource, read_shards, read_tar
from .catalogue import CATALOGUE
from .config import DataConfig
from .errors import UserError, one_line
from .sources import ClassRange, DigitsSource, FolderSource, Source, fingerprint, listed
from .val_file import held_out

DATA_VARIABLE = "METALA_VISION_DATA"
VAL_NAMES = ("val", "validation")
IN_FILES = ("folder", "tar", "wds", "flowers102", "oxford_pets")  # images that have names
OR_HOLD_OUT = "--val-fraction 0.1 or --val-file FILE"
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test")


@dataclass(eq=False)
class Split:
    """Where the training and the held-out images come from; `root` is None where no folder is."""

    root: Path | None
    train: Source
    train_indices: Sequence[int]
    val: Source
    val_indices: Sequence[int]

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same images, labels and parts."""
        parts = f"{list(self.train_indices)} {list(self.val_indices)}"
        text = f"{fingerprint(self.train)} {fingerprint(self.val)} {parts}"
        return hashlib.sha256(text.encode()).hexdigest()


def find_split(config: DataConfig) -> Split:
    """Locate the images and decide which are held out.

    Raises:
        UserError: a missing or empty folder, a single class, no held-out images, a class that
            only the held-out part has, settings that contradict each other.
    """
    split = _whole_split(config)
    if config.class_range is not None:
        split = _of_classes(split, *config.class_range)
    for part, indices in (("training", split.train_indices), ("held-out", split.val_indices)):
        if not len(indices):
            low, high = config.class_range or (0, split.num_classes)
            raise UserError(f"no {part} image of classes {low} to {high - 1}")
    return split


def _of_classes(split: Split, low: int, high: int) -> Split:
    """The same parts, of some classes."""

    def part(source: Source, indices: Sequence[int]) -> tuple[Source, Sequence[int]]:
        own = ClassRange(source, low, high)
        place = {index: i for i, index in enumerate(own.indices)}
        return own, [place[i] for i in indices if i in place]

    return Split(
        split.root, *part(split.train, split.train_indices), *part(split.val, split.val_indices)
    )


def _whole_split(config: DataConfig) -> Split:
    if config.val_file is not None:
        if config.dataset not in IN_FILES:
            raise UserError(
                f"data.val_file is for dataset {', '.join(IN_FILES)}, not {config.dataset}"
            )
        if config.val_fraction is not None:
            raise UserError(
                f"data.val_file={config.val_file} and val_fraction={config.val_fraction} were both "
                "given; drop one"
            )
    if config.dataset in ("folder", "digits", *CATALOGUE):
        for key in ("input_key", "target_key"):
            if getattr(config, key) is not None:
                raise UserError(f"data.{key} is for dataset wds and hfds, not {config.dataset}")
    if config.dataset == "digits":
        if config.data_dir is not None:
            raise UserError(
                f"data.dataset='digits' takes no data folder, got {config.data_dir}; "
                "for a folder give --dataset folder"
            )
        return _hold_out(None, DigitsSource(), config, "the digits")
    if config.dataset.startswith("hfds"):
        return _hub_split(config)
    root = _data_root(config)
    if config.dataset == "folder":
        return _folder_split(root, config)
    if config.dataset in CATALOGUE:
        return _published_split(root, config)
    return _archive_split(root, config)


def _folder_split(root: Path, config: DataConfig) -> Split:
    train_dir = root / config.train_split
    names = VAL_NAMES if config.val_split is None else (config.val_split,)
    val_dir = next((root / name for name in names if (root / name).is_dir()), None)
    if val_dir is None or not train_dir.is_dir():
        if not _holds_out(config):
            wanted = f"{config.train_split}/ and {names[0]}/"
            raise UserError(
                f"{root} needs {wanted} with one folder per class, found {listed(root)}; "
                f"to hold out part of one tree of class folders give {OR_HOLD_OUT}"
            )
        tree = train_dir if train_dir.is_dir() else root
        splits = [p.name for p in tree.iterdir() if p.is_dir() and p.name.lower() in SPLIT_NAMES]
        if splits:
            raise UserError(
                f"{tree} holds {splits[0]}/, which is no class; the parts must be named train/ and "
                "val/, or --data-dir be the tree to hold out from"
            )
        return _hold_out(root, FolderSource(tree), config, str(tree))
    _check_holds_out_nothing(config, str(val_dir))
    train = FolderSource(train_dir)
    _check_classes(train, str(train_dir))
    return _parts(root, train, FolderSource(val_dir, train.classes))


def _archive_split(root: Path, config: DataConfig) -> Split:
    """Of tars: DIR/train.tar, DIR/train/*.tar, DIR/*train-0001.tar and so on."""

    def read(path: Path | list[Path], classes: list[str] | None = None) -> Source:
        if config.dataset == "tar":
            assert isinstance(path, Path)
            return read_tar(path, classes)
        files = path if isinstance(path, list) else [path]
        return read_shards(files, classes, config.input_key, config.target_key)

    def find(name: str) -> Path | list[Path] | None:
        single, folder = root / f"{name}.tar", root / name
        if config.dataset == "tar":
            if single.is_file():
                return single
            return folder if any(folder.glob("*.tar")) else None
        numbered = re.compile(rf"(.*[-_.])?{re.escape(name)}[-_.]?\d*")
        files = [p for p in root.glob("*.tar") if numbered.fullmatch(p.stem)]
        return sorted([*files, *folder.glob("*.tar")]) or None

    if config.dataset == "tar" and (config.input_key or config.target_key):
        raise UserError("data.input_key and target_key are for dataset wds and hfds, not tar")
    name, shards = config.train_split, config.dataset == "wds"
    train_path = find(name)
    names = VAL_NAMES if config.val_split is None else (config.val_split,)
    val_path = next((path for path in map(find, names) if path), None)
    if train_path is None:
        raise UserError(
            f"{root} needs {name}.tar or tar files in {name}/"
            f"{f', or NAME-{name}-0000.tar' if shards else ''}, found {listed(root)}"
        )
    train = read(train_path)
    where = f"{config.train_split} of {root}"
    if val_path is None:
        if not _holds_out(config):
            raise UserError(
                f"{root} has no {names[0]}.tar and no tar files in {names[0]}/; to hold out part "
                f"of the training images give {OR_HOLD_OUT}"
            )
        return _hold_out(root, train, config, where)
    _check_holds_out_nothing(config, "a held-out part")
    _check_classes(train, where)
    return _parts(root, train, read(val_path, train.classes))


def _hub_split(config: DataConfig) -> Split:
    name = config.dataset.removeprefix("hfds").removeprefix("/")
    if bool(name) == (config.data_dir is not None):
        raise UserError(
            "data.dataset='hfds' takes a local folder as --data-dir, or a name of the hub as "
            f"hfds/NAME, one of both; got {config.dataset!r} and data_dir={config.data_dir}"
        )
    root = None if name else _data_root(config)
    keys = config.input_key, config.target_key
    origin = name or str(root)
    train = HubSource(origin, config.train_split, *keys)
    if config.val_fraction is not None:
        return _hold_out(root, train, config, origin)
    _check_classes(train, origin)
    val = HubSource(origin, config.val_split or "validation", *keys)
    if len(val.classes) > len(train.classes):
        raise UserError(
            f"{val.origin} has {len(val.classes)} classes, {len(train.classes)} are trained"
        )
    return _parts(root, train, val)


def _published_split(root: Path, config: DataConfig) -> Split:
    """The authors' parts, or part of the training part."""
    of = CATALOGUE[config.dataset]
    folder = of.find(root)

    def read(parts: list[str], classes: list[str] | None = None) -> Source:
        try:
            source = of.read(folder, parts, of, classes)
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror}") from error
        if not len(source):
            raise UserError(f"no images in {'+'.join(parts)} of {folder}")
        return source

    chosen = of.chosen("train_split", config.train_split)
    if _holds_out(config):
        if config.val_split is not None:
            key = "val_fraction" if config.val_fraction else "val_file"
            raise UserError(
                f"data.{key}={getattr(config, key)} holds out of the training part, and val_split="
                f"{config.val_split} names another part; drop one"
            )
        return _hold_out(root, read(chosen), config, f"{'+'.join(chosen)} of {folder}")
    others = of.chosen_beside(chosen, config.val_split)
    train = read(chosen)
    _check_classes(train, str(folder))
    return _parts(root, train, read(others, train.classes))


def _parts(root: Path | None, train: Source, val: Source) -> Split:
    return Split(root, train, range(len(train.targets)), val, range(len(val.targets)))


def _holds_out(config: DataConfig) -> bool:
    return config.val_fraction is not None or config.val_file is not None


def _check_holds_out_nothing(config: DataConfig, what: str) -> None:
    for key in ("val_fraction", "val_file"):
        value = getattr(config, key)
        if value is not None:
            raise UserError(f"{key}={value} was given, but {what} exists; drop one")


def _data_root(config: DataConfig) -> Path:
    named = config.data_dir or os.environ.get(DATA_VARIABLE)
    if not named:
        raise UserError(f"no data folder: give --data-dir DIR or set {DATA_VARIABLE}")
    root = Path(named).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data folder {root} {what}")
    try:
        next(root.iterdir(), None)
    except OSError as error:
        raise UserError(f"cannot read data folder {root}: {error.strerror}") from error
    return root


def _check_classes(source: Source, where: str) -> None:
    if len(source.classes) < 2:
        raise UserError(
            f"{where} has one class, {source.classes[0]!r}; at least two class folders are needed"
        )


def _hold_out(root: Path | None, source: Source, config: DataConfig, where: str) -> Split:
    """The images that a file lists, or the same fraction of each class, drawn with the seed."""
    fraction, seed = config.val_fraction or 0.2, config.split_seed
    _check_classes(source, where)
    if config.val_file is not None:
        train, val = held_out(config.val_file, source, where)
        return Split(root, source, train, source, val)
    sizes = np.bincount(source.targets, minlength=len(source.classes))
    if sizes.min() < 2:
        name = source.classes[int(sizes.argmin())]
        raise UserError(
            f"cannot hold out {fraction} of each class of {where}: class {name!r} has one image"
        )
    from sklearn.model_selection import train_test_split  # two seconds, which few runs need

    try:
        parts: Any = train_test_split(
            range(len(source.targets)),
            test_size=fraction,
            random_state=seed,
            stratify=source.targets,
        )
    except ValueError as error:
        raise UserError(
            f"cannot hold out {fraction} of each class of {where}: {one_line(error)}"
        ) from error
    return Split(root, source, parts[0], source, parts[1])
