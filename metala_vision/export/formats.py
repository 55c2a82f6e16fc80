"""The model as a graph, and the three kinds of file that hold one."""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from metala_vision.errors import UserError, one_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
METADATA_FILE = "metadata.json"  # inside a torch file
ONNX_LIMIT = 2**31  # bytes of one protocol buffer


class Deployed(nn.Module):
    """What the file computes: float32 in and out, `model` in its own dtype between.

    Args:
        mean, std: of each channel, where images of [0, 1] come in.
        softmax: probabilities come out.
    """

    mean: Any
    std: Any

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        softmax: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.softmax = softmax
        self.normalize = mean is not None
        for name, values in (("mean", mean), ("std", std)):
            value = None if values is None else torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=True)

    def forward(self, images: Tensor) -> Tensor:
        if self.normalize:
            images = (images - self.mean) / self.std
        y = self.model(images.to(self.dtype)).float()
        return y.softmax(1) if self.softmax else y


def dynamic_shapes(dynamic: str, patch: tuple[int, int]) -> Any:
    """Of the images, in torch.export's words; a map of features is at least two patches a side."""
    if dynamic == "none":
        return None
    axes: dict[int, Any] = {0: Dim("batch")}
    if dynamic == "size":
        axes[2] = patch[0] * Dim("height", min=2)
        axes[3] = patch[1] * Dim("width", min=2)
    return (axes,)


def write(
    kind: str, model: nn.Module, example: Tensor, shapes: Any, output: str, path: Path,
    metadata: dict[str, Any], opset: int | None,
) -> int | None:  # fmt: skip
    """Write the file; the opset of ONNX.

    Args:
        kind: "torch", "onnx" or "aoti". example: images [B, C, height, width].
        shapes: see dynamic_shapes. output: what the result is called.
        metadata: what the file is to say of itself.
    Raises:
        UserError: with the reason of the exporter.
    """
    try:
        with torch.no_grad(), quiet():
            if kind == "onnx":
                return _onnx(model, example, shapes, output, path, metadata, opset)
            program = export(model, (example,), dynamic_shapes=shapes, strict=False)
            if kind == "torch":
                _forget_sources(program)
                texts = {METADATA_FILE: json.dumps(metadata)}
                torch.export.save(program, path, extra_files=texts)
            else:
                texts = {
                    key: value if isinstance(value, str) else json.dumps(value)
                    for key, value in metadata.items()
                }
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path),
                    inductor_configs={"aot_inductor.metadata": texts},
                )  # fmt: skip
    except (UserError, OSError):
        raise
    except Exception as error:  # exporters and compilers raise anything
        raise UserError(f"--format {kind} does not take this model: {_reason(error)}") from error
    return None


def _onnx(
    model: nn.Module, example: Tensor, shapes: Any, output: str, path: Path,
    metadata: dict[str, Any], opset: int | None,
) -> int:  # fmt: skip
    size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise UserError(
            f"--format onnx holds less than 2 GB in one file, the model has {size:,} bytes"
        )
    program: Any = torch.onnx.export(
        model, (example,), dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False,
        input_names=["images"], output_names=[output],
    )  # fmt: skip
    made = program.model.opset_imports[""]
    if opset is not None and made != opset:
        raise UserError(f"--opset {opset}: the exporter cannot, it gives {made}")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of source files of this machine
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        program.model.metadata_props[key] = text
    program.save(str(path), external_data=False)
    return made


def _forget_sources(program: ExportedProgram) -> None:
    """Where in which file of this machine each node comes from."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "source_fn_stack", "from_node"):
            node.meta.pop(key, None)


def _reason(error: Exception) -> str:
    """The first sentence or so: exporters print pages."""
    text = one_line(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, logs or progress of exporters; exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
