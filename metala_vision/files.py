"""Files that are whole, or as they were."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


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
