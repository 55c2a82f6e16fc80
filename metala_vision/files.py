"""Files that are whole, or as they were, and a choice of many."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .errors import UserError

T = TypeVar("T")
PICTURES = (".png", ".pdf", ".svg")  # endings


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` behind the block, unless that fails.

    What is there and no file, such as /dev/stdout, is written to itself.

    Raises:
        UserError: where it cannot be written.
    """
    itself = path.exists() and not path.is_file()
    path = path if itself else path.resolve()  # a link stays one
    # A name that is nobody's; pictures are written by their ending.
    fresh = path if itself else path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield fresh
        if not itself:
            os.replace(fresh, path)
    except BaseException as error:
        if not itself:
            with contextlib.suppress(OSError):
                fresh.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """In UTF-8, line ends as they are.

    Raises:
        UserError: where it cannot be written.
    """
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="")


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Iterable[tuple[Path, str]] = ()
) -> None:
    """Before any work: each file can be written, and none is another one's, or an input.

    Args:
        outputs: by flag. inputs: files that are read, and their flags.
    Raises:
        UserError: naming flag and file.
    """
    taken = {path.resolve(): flag for path, flag in inputs}
    for flag, path in outputs.items():
        if path is None:
            continue
        if path.is_file() or not path.exists():  # not /dev/stdout
            other = taken.setdefault(path.resolve(), flag)
            if other != flag:
                raise UserError(f"{flag} {path} is {other} too")
        check_writable(path)


def check_writable(path: Path) -> None:
    """A UserError if the file cannot be written; one that does not exist is not left behind."""
    there = os.path.lexists(path)
    try:
        with path.open("ab"):
            pass
        if not there:
            os.unlink(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def check_picture(flag: str, path: Path | None) -> None:
    """A UserError for an ending that is no picture's."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise UserError(f"{flag} must end in one of {' '.join(PICTURES)}, got {path}")


def evenly_spread(items: Sequence[T], most: int) -> list[T]:
    """Up to `most` of them, evenly spread over all, in their order."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
