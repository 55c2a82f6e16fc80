"""Models of others, from files outside of this repository."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm

from metala_vision.errors import UserError


def peer(text: str) -> tuple[str, Callable[[int], Any]]:
    """NAME and FUNCTION of NAME=FILE.py:FUNCTION.

    Raises:
        UserError: naming what is wrong with it.
    """
    name, equals, place = text.partition("=")
    file, colon, function = place.rpartition(":")
    if not (name and equals and file and colon and function):
        raise UserError(f"--peer must be NAME=FILE.py:FUNCTION, got {text!r}")
    if timm.is_model(name):
        raise UserError(f"--peer {name!r} is the name of a model of timm; choose another")
    if not Path(file).is_file():
        raise UserError(f"--peer {name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"peer_{name}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--peer {name}: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(file).resolve().parent))  # as when it is run
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"--peer {name}: {file} has no function {function}")
    return name, getattr(module, function)
