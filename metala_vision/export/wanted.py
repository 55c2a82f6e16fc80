"""What is to be exported, and whether it can be; imports nothing of torch."""

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metala_vision.errors import UserError

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
DYNAMIC = ("batch", "size", "none")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSETS = (18, 23)  # first and last


@dataclass
class Export:
    """What is exported, and how; see the flags."""

    checkpoint: str
    format: str
    out: Path
    img_size: tuple[int, int] | None = None
    dynamic: str = "batch"
    batch_size: int | None = None  # of dynamic "none"
    softmax: bool = False
    normalize: bool = False
    dtype: str = "float32"
    opset: int | None = None
    data_dir: Path | None = None
    images: list[Path] = field(default_factory=list)
    max_images: int = 32
    replace: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """What is wrong before any work.

        Raises:
            UserError: naming the flag.
        """
        suffix = SUFFIXES[self.format]
        if self.out.suffix != suffix:
            raise UserError(f"--out must end in {suffix} for --format {self.format}: {self.out}")
        for path in (self.out, sidecar_of(self.out)):
            if path.is_dir():
                raise UserError(f"--out {path} is a folder")
            if os.path.lexists(path) and not self.replace:
                raise UserError(f"{path} is there already; --replace writes over it")
            if not path.parent.is_dir():
                raise UserError(f"cannot write {path}: No such folder")
            if not os.access(path.parent, os.W_OK):
                raise UserError(f"cannot write {path}: the folder refuses")
        if self.img_size is not None and min(self.img_size) < 1:
            raise UserError(f"--img-size needs 1 or more, got {min(self.img_size)}")
        if self.dynamic != "none" and self.batch_size is not None:
            raise UserError("--batch-size is for --dynamic none; else any batch is taken")
        if self.dynamic == "none":
            self.batch_size = 1 if self.batch_size is None else self.batch_size
            if self.batch_size < 1:
                raise UserError(f"--batch-size needs 1 or more, got {self.batch_size}")
        if self.max_images < 1:
            raise UserError(f"--max-images needs 1 or more, got {self.max_images}")
        if self.data_dir is not None and self.images:
            raise UserError("--data-dir and --images name the same thing: give one")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise UserError(f"data folder {self.data_dir} does not exist")
        for path in self.images:
            if not path.exists():
                raise UserError(f"image {path} does not exist")
        if self.opset is not None and self.format != "onnx":
            raise UserError(f"--opset is for --format onnx, not {self.format}")
        if self.opset is not None and not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise UserError(f"--opset takes {OPSETS[0]} to {OPSETS[1]}, got {self.opset}")
        if self.format == "onnx" and self.dtype == "bfloat16":
            raise UserError("--dtype bfloat16 cannot be checked in ONNX: onnxruntime has no such "
                            "operators for a CPU; float32 and float16 can")  # fmt: skip
        refused = {"in_chans", "img_size", "device", "dtype", "exportable"} & set(self.model_kwargs)
        if refused:
            raise UserError(f"--model-kwargs takes no {min(refused)}; --img-size and --dtype are "
                            "flags")  # fmt: skip
        if self.format == "onnx":
            _check_onnx()
        if self.format == "aoti":
            _check_compiler()


def sidecar_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _check_onnx() -> None:
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: pip install 'metala-vision[export]'"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # blocked
        return False


def _check_compiler() -> None:
    """As torch's Inductor chooses it."""
    named = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not (words := shlex.split(named)) or shutil.which(words[0]) is None:
        raise UserError(
            f"--format aoti needs a C++ compiler, {named!r} is not there: install one, or name it "
            "by the variable CXX"
        )
