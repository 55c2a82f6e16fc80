"""Whether a file of weights is what it should be, before a model sees it."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from metala_vision.errors import WeightsError, one_line

from .manifest import Entry

FIRST, HEAD = "patch_embed.proj.weight", "head.fc.weight"  # of every model of ours
LARGEST_HEADER = 2**24  # bytes; a thousand tensors take 100 kB
DTYPES = ("F16", "BF16", "F32", "F64")


def sha256_of(path: Path) -> str:
    """Hexadecimal, of the whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_file(path: Path, entry: Entry) -> None:
    """Raises WeightsError unless `path` has the size and the sha256 of the manifest."""
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise WeightsError(f"{path} has {size:,} bytes, the manifest says {entry.size:,}")
        found = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if found != entry.sha256:
        raise WeightsError(f"{path} has sha256 {found}, the manifest says {entry.sha256}")


def check_entry(path: Path, entry: Entry) -> None:
    """Raises WeightsError unless the file holds floats, and what its manifest says of the model's
    two ends: nothing is allocated for a number that a manifest has made up."""
    shapes = check_tensors(path)
    channels = shapes.get(FIRST, (0, 0))[1:2]
    outputs = shapes.get(HEAD, (0,))[:1]
    for what, found, told in (
        ("channels", channels, entry.preprocessing.input_size[0]),
        ("classes", outputs, entry.num_classes),
    ):
        if found != (told,):
            have = found[0] if found else 0
            raise WeightsError(f"{path} has {have} {what}, the manifest says {told}")


def check_tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file by name, none of its values read.

    Raises:
        WeightsError: where it is another kind of file, damaged, or holds other than floats.
    """
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if not 2 <= header <= min(LARGEST_HEADER, path.stat().st_size - 8):
            raise WeightsError(
                f"{path} is no safetensors file: a header of {header:,} bytes in a file of "
                f"{path.stat().st_size:,}"
            )
        shapes = {}
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                part = tensors.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise WeightsError(
                        f"{path}: {name} is of type {part.get_dtype()}; {', '.join(DTYPES)} are "
                        "accepted"
                    )
                shapes[name] = tuple(part.get_shape())
        return shapes
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file: {one_line(error)}") from error
