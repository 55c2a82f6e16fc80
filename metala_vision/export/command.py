"""`metala-vision export CHECKPOINT --format torch|onnx|aoti --out FILE`."""

import argparse
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
HOW = {
    "torch": ("import torch", "model = torch.export.load({file!r}).module()",
              "{output} = model(torch.zeros({shape}))"),
    "onnx": ("import numpy, onnxruntime", "session = onnxruntime.InferenceSession({file!r})",
             "{output} = session.run(None, {{'images': numpy.zeros(({shape}), 'float32')}})[0]"),
    "aoti": ("import torch", "model = torch._inductor.aoti_load_package({file!r})",
             "{output} = model(torch.zeros({shape}))"),
}  # fmt: skip


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
        """What is wrong before any work; imports nothing of torch.

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; imports nothing of torch."""
    add = parser.add_argument
    add("checkpoint", help="folder that a run left, or a timm model's name")
    add("--format", choices=SUFFIXES, required=True,
        help="torch (torch.export), onnx, or aoti: AOTInductor, for CPUs as this one")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FILE",
        help=f"ends in {', '.join(f'{s} ({k})' for k, s in SUFFIXES.items())}; FILE.json "
        "describes it")  # fmt: skip
    add("--img-size", nargs="+", type=int, metavar="PX", help="side, or height and width [the "
        "model's]")  # fmt: skip
    add("--dynamic", choices=DYNAMIC, default="batch", help="any batch; size: any batch and any "
        "size of image; none [batch]")  # fmt: skip
    add("--batch-size", type=int, help="of --dynamic none [1]")
    add("--softmax", action="store_true", help="probabilities come out, not logits")
    add("--normalize", action="store_true",
        help="images of 0 to 1 go in; mean and std are inside")  # fmt: skip
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32",
        help="of weights and computation; input and output stay float32 [float32]")  # fmt: skip
    add("--opset", type=int, help=f"of ONNX, {OPSETS[0]} to {OPSETS[1]} [the exporter's]")
    add("--data-dir", type=Path, metavar="DIR", help="check with images of its val/ too")
    add("--images", type=Path, nargs="+", default=[], metavar="PATH",
        help="check with these too: files, or folders of images")  # fmt: skip
    add("--max-images", type=int, default=32, help="of all [32]")
    add("--replace", action="store_true", help="write over what is there")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE")


def run(given: argparse.Namespace) -> int:
    """Export and tell; the last line printed is the file's path."""
    values = vars(given)
    size = values.pop("img_size")
    if size is not None and len(size) > 2:
        raise UserError(f"--img-size takes one or two numbers, got {len(size)}")
    sides = None if size is None else (size[0], size[-1])
    wanted = Export(**values, img_size=sides)
    wanted.check()
    from .artefact import export_checkpoint

    proof, facts = export_checkpoint(wanted)
    print(
        f"relative to float64, the worst of {proof.images} images: file {proof.file:.1e}, eager "
        f"{wanted.dtype} {proof.eager:.1e}, allowed {proof.allowed:.1e}; file to eager "
        f"{proof.difference:.1e}"
    )
    if proof.same is not None:
        print(f"top-1 is eager's on {proof.same} of {proof.images} images, {proof.real} of them "
              "real, the others noise")  # fmt: skip
    print(f"{facts['file']['bytes']:,} bytes, run in a process without metala_vision and timm:")
    shape = ", ".join(map(str, (wanted.batch_size or 1, *facts["input"]["size"])))
    for line in HOW[wanted.format]:
        output = facts["output"]["name"]
        print("    " + line.format(file=str(wanted.out), output=output, shape=shape))
    print(wanted.out)
    return 0
