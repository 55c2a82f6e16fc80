"""Pickles of numpy arrays, read without running any code of theirs.

A pickle calls what it names. Here it gets no object of numpy, whose constructors trust their caller
with pointers, but stands-in that keep what is said; arrays are made from them, checked.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError, one_line


def read_pickle(path: Path) -> dict[str, Any]:
    """A dictionary of numbers, texts, lists and arrays, as Python 2 wrote CIFAR.

    No code of the file runs; of arrays, those that are values of the dictionary are made.

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
    return {k: x.value if isinstance(x, _Array) else x for k, x in found.items()}


class _Dtype:
    """Of numbers, by its code; of its state only the order of bytes."""

    __slots__ = ("value",)

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str):
            raise pickle.UnpicklingError(f"it holds an array of {type(code).__name__}")
        self.value = np.dtype(code)
        if self.value.kind not in "uif":
            raise pickle.UnpicklingError(f"it holds an array of {one_line(code):.40}")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds numbers of byte order {order!r:.40}")
        self.value = self.value.newbyteorder(order)


class _Array:
    """An array, once its state is told."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: str) -> "_Array":
        if isinstance(data, str):
            data = data.encode("latin1")  # as Python 2 wrote bytes
        sizes = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray) or not sizes:
            raise pickle.UnpicklingError("it holds an array of no bytes, type or shape")
        flat = np.frombuffer(data, dtype.value)
        self.value = flat.reshape(shape, order="F" if order == "F" else "C").copy()
        return self


class _Maker:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what it may call")


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes that Python 3 has written for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {one_line(encoding):.40}")
    return str.encode(text, "latin1")


def _no_call(*_: Any) -> None:
    raise pickle.UnpicklingError("it makes an array in a way of its own")


_NDARRAY = _Maker(_no_call)  # named as the type of what is made
_RECONSTRUCT = _Maker(lambda kind, shape, code: _Array())
_FROM_BUFFER = _Maker(lambda data, dtype, shape, order: _Array().fill(data, dtype, shape, order))
# All that a pickle may name; numpy 2 has renamed numpy.core.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Maker(lambda code, *flags: _Dtype(code)),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): _Maker(_latin1),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {one_line(f'{module}.{name}'):.80}")
        return _ALLOWED[module, name]
