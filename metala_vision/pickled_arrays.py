"""Pickles of numpy arrays, read without running any code of theirs."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError, one_line


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of numbers, texts, lists and arrays, as Python 2 wrote CIFAR.

    No code of the file runs: numpy's arrays are made, and nothing else is called.

    Raises:
        UserError: for anything else, and a file that is damaged.
    """
    try:
        with path.open("rb") as file:
            found = _ArraysOnly(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"cannot read {path} as a pickle of arrays alone: {one_line(error)}"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"cannot read {path}: {one_line(error) or type(error).__name__}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, no dictionary of arrays")
    return found


def _dtype(code: str, *flags: object) -> np.dtype:
    """Of numbers; the flags that old files spell as 0 and 1 make numpy warn."""
    found = np.dtype(code, copy=True)  # a pickle sets its state
    if found.kind not in "uif":
        raise pickle.UnpicklingError(f"it holds an array of {one_line(code):.40}")
    return found


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes that Python 3 has written for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {one_line(encoding):.40}")
    return text.encode("latin1")


_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
# All that a pickle may call; numpy 2 has renamed numpy.core.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {one_line(f'{module}.{name}'):.80}")
        return _ALLOWED[module, name]
