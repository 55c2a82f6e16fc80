"""The images of a user's: files and folders, read as a viewer shows them."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from metala_vision.errors import UnreadableImage, UserError, one_line
from metala_vision.sources import IMG_EXTENSIONS, convert, decode


def find_images(given: Sequence[str]) -> list[Path]:
    """Files as they are given, and the images of folders, recursively and sorted; hidden files and
    folders are left out.

    Raises:
        UserError: an address, a path that does not exist, a folder without images.
    """
    files: list[Path] = []
    for text in given:
        path = Path(text).expanduser()
        if "://" in text:
            raise UserError(f"{text} is an address; files and folders of images are accepted")
        if path.is_dir():
            found = sorted(_below(path))
            if not found:
                raise UserError(
                    f"no images in folder {path}; endings read: {' '.join(IMG_EXTENSIONS)}"
                    + _hint(path)
                )
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"image {path} does not exist{_hint(path)}")
    return files


def _hint(path: Path) -> str:
    """Where a model may have been meant."""
    import timm

    meant = (path / "config.json").is_file() or timm.is_model(str(path))
    return "; a model is named by --model" if meant else ""


def _below(folder: Path) -> Iterator[Path]:
    """Links are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}") from error

    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in names:
            if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS):
                yield Path(root, name)


def read_image(path: Path, mode: str) -> Image.Image:
    """As "RGB" or "L", turned as its EXIF orientation says: phones store what the sensor saw.

    Raises:
        UnreadableImage: naming it.
    """
    name = printable(path)
    image = decode(path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # damaged notes leave an image that can be read
            image = ImageOps.exif_transpose(image)
    try:
        return convert(image, mode)
    except (ValueError, OSError) as error:  # of a rare kind of pixel
        raise UnreadableImage(f"cannot read image {name}: {one_line(error)}") from error


def printable(path: Path) -> str:
    """A name for a line of text: bytes that are no UTF-8, and line breaks, as question marks."""
    return "".join(c if c.isprintable() else "?" for c in str(path))
