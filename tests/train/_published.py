"""Small folders of noise in the layouts of CIFAR, Oxford Flowers and Oxford Pets."""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat


class Python2Pickler(pickle._Pickler):
    """Text and bytes as Python 2 wrote its strings, numpy by its old name: CIFAR's own files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        data = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    def save_global(self, found, name=None):
        module = found.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or found.__qualname__}\n".encode())
        self.memoize(found)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[type] = dispatch[type(len)] = dispatch[type(lambda: 0)] = save_global


def dump(path: Path, value, protocol=None) -> None:
    """protocol: of Python 3; None is Python 2's."""
    with path.open("wb") as file:
        if protocol is None:
            Python2Pickler(file, 2).dump(value)
        else:
            pickle.dump(value, file, protocol)


def make_cifar(root: Path, hundred: bool = False, count: int = 6, protocol=None) -> Path:
    """count images a file, of three classes; five files and test_batch, or train and test."""
    folder = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    fine = "fine_" if hundred else ""
    names = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6))]
    for name in names if hundred else [*names, "test_batch"]:
        values = {
            "batch_label": name, f"{fine}labels": [(i * 7 + 1) % 3 for i in range(count)],
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "filenames": [f"{i}.png" for i in range(count)],
        }  # fmt: skip
        if hundred:
            values["coarse_labels"] = [0] * count
        dump(folder / name, values, protocol)
    meta = {f"{fine}label_names": ["airplane", "automobile", "bird"]}
    dump(folder / ("meta" if hundred else "batches.meta"), meta, protocol)
    return folder


def noise(rng, size=(40, 36)) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def make_flowers(root: Path, count: int = 27) -> Path:
    """Three classes, a third of the images in each part, in no order."""
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(1, count + 1):
        noise(rng).save(folder / "jpg" / f"image_{number:05d}.jpg")
    labels = (np.arange(count) % 3 + 1).astype(np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    order = (rng.permutation(count // 3) * 3)[:, None] + np.arange(1, 4)
    parts = np.array_split(order.reshape(-1).astype(np.uint16)[None], 3, axis=1)
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), parts, strict=True)))
    return folder


def make_pets(root: Path, count: int = 4) -> Path:
    """Three classes, count images each in trainval and in test; some as that set has them."""
    folder = root / "oxford-iiit-pet"
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, first in (("trainval", 1), ("test", 100)):
        lines = []
        for number, name in enumerate(("Abyssinian", "american_bulldog", "Egyptian_Mau"), 1):
            for i in range(first, first + count):
                image = noise(rng)
                kind = {1: "L", 2: "CMYK", 3: "RGBA"}.get(i)
                options = {"format": "PNG" if kind == "RGBA" else "JPEG"}
                image.convert(kind).save(folder / "images" / f"{name}_{i}.jpg", **options)
                lines.append(f"{name}_{i} {number} {1 + number % 2} 1\n")
        (folder / "annotations" / f"{part}.txt").write_text("".join(lines))
    return folder


MAKERS = {
    "cifar10": make_cifar,
    "cifar100": lambda root: make_cifar(root, hundred=True, count=12),
    "flowers102": make_flowers,
    "oxford_pets": make_pets,
}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()
