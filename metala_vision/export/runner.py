"""Run an exported file where this package and timm cannot be imported: a process of its own.

    python runner.py FORMAT FILE INPUTS.npz OUTPUTS.npz

Arrays of outputs have the names of their inputs. Not for import: what the commands of this package
need besides is in the other modules.
"""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

BLOCKED = ("metala_vision", "timm")


def load(kind: str, path: str) -> Callable[[Any], Any]:
    """A function of numpy arrays."""
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)  # 0: all cores
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]
    import torch

    torch.set_grad_enabled(False)
    if kind == "torch":
        model: Any = torch.export.load(path).module()
    else:
        model = torch._inductor.aoti_load_package(path)
    return lambda x: model(torch.from_numpy(x)).numpy()


def main(kind: str, path: str, inputs: str, outputs: str) -> None:
    import numpy as np

    with np.load(inputs) as given:
        arrays = {name: given[name] for name in given.files}
    model = load(kind, path)
    np.savez(outputs, **{name: model(x) for name, x in arrays.items()})


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    for name in BLOCKED:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]  (its import is an error)
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
