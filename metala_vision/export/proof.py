"""Whether a file computes what its model does: run in a process of its own, against float64.

Two ways to compute the same differ by what rounding makes of either. How much that is for this
model is measured: the distance of eager PyTorch, in the file's dtype, from float64. The file may be
a small multiple of that away, and no more.
"""

import copy
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metala_vision.errors import UserError, one_line

from . import runner
from .formats import DTYPES

# Twice is the rule for another order of the same sums (tests/_numerics.py), and in float32 another
# factor of two for exp and log of a runtime's own: measured 0.8 to 1.8 over formats and families.
MULTIPLE = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
LEAST = torch.finfo(torch.float32).eps  # of an error: the outputs themselves are rounded


@dataclass(frozen=True)
class Case:
    """Inputs of one shape: `images` as the file takes them, `normalised` as the model does."""

    images: Tensor
    normalised: Tensor
    real: bool


@dataclass(frozen=True)
class Proof:
    """Relative errors, each the largest of an image: |difference| / |truth| over its outputs.

    eager: of eager PyTorch in the file's dtype, from float64. file: of the file, from float64.
    difference: of the file from eager PyTorch. allowed: for `file`. same: images with eager's
    top-1, None where there are no classes; of them `images`, `real` of which are no noise.
    """

    eager: float
    file: float
    difference: float
    allowed: float
    images: int
    real: int
    same: int | None
    shapes: list[list[int]]


def noise(shape: tuple[int, ...], seed: int, unit: bool) -> Tensor:
    """Standard normal, or uniform in [0, 1]; float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) if unit else torch.randn(
        shape, generator=generator
    )  # fmt: skip


def truth(model: nn.Module, x: Tensor, softmax: bool) -> Tensor:
    """Of a model in its own dtype, in float64 behind it."""
    y = model(x).double()
    return y.softmax(1) if softmax else y


@torch.no_grad()
def prove(
    kind: str, path: Path, model: nn.Module, cases: list[Case], dtype: str, softmax: bool,
    classes: bool,
) -> Proof:  # fmt: skip
    """Compare the file with the model.

    Args:
        model: in float32, as `eval` loads it; not the one that was exported.
        classes: the outputs are, and have a largest one.
    Raises:
        UserError: for a file that does not run by itself, or is too far away.
    """
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model).to(DTYPES[dtype])
    truths = [truth(exact, case.normalised.double(), softmax) for case in cases]
    eagers = [truth(eager, case.normalised.to(DTYPES[dtype]), softmax) for case in cases]
    found = [torch.from_numpy(x) for x in run_file(kind, path, [case.images for case in cases])]
    eager_error = max(map(relative, eagers, truths))
    if not eager_error < 1:
        raise UserError(
            f"--dtype {dtype}: the model itself is off by {eager_error:.1e} of its outputs in it"
        )
    allowed = MULTIPLE[dtype] * max(eager_error, LEAST)
    error, difference = max(map(relative, found, truths)), max(map(relative, found, eagers))
    if not error <= allowed:
        raise UserError(
            f"the {kind} file is not the model: off by {error:.1e} of its outputs, "
            f"{allowed:.1e} is allowed (eager {dtype}: {eager_error:.1e}); nothing was written"
        )
    same = None
    if classes:
        same = sum(
            int((a.argmax(1) == b.argmax(1)).sum()) for a, b in zip(found, eagers, strict=True)
        )
    return Proof(
        eager_error, error, difference, allowed, sum(len(case.images) for case in cases),
        sum(len(case.images) for case in cases if case.real), same,
        [list(case.images.shape) for case in cases],
    )  # fmt: skip


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest over images; inf where a shape differs or a value is not finite."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    if not bool(expected.isfinite().all()):
        return float("inf")
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)).max())


def run_file(kind: str, path: Path, inputs: list[Tensor]) -> list[Any]:
    """The file's outputs, numpy, in a process that has neither this package nor timm."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(given, **{f"x{i}": x.numpy() for i, x in enumerate(inputs)})  # pyright: ignore
        command = [sys.executable, runner.__file__, kind, str(path.resolve()), given, made]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", cwd=folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        if done.returncode or not made.is_file():
            told = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UserError(f"the {kind} file does not run by itself: {one_line(told[-1])[:300]}")
        with np.load(made) as arrays:
            return [arrays[f"x{i}"] for i in range(len(inputs))]
