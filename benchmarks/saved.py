"""What a compiled training step keeps for its backward pass, counted; no GPU is needed.

    python benchmarks/saved.py [--models NAME ...] [--size PIXELS] [--batch B] [--out FILE.json]

Forward under autocast to bfloat16, as torch.compile's partitioner divides it from the backward
pass, with the operators as nodes as on a GPU: the bytes of all that the forward graph hands to the
backward graph, weights in 16 bits among it, images and weights in float32 not. It is counted for
two and four images, which gives it for any batch. The peak of a step lies above it by gradients,
optimizer and what is needed on the way. The CPU's autocast stands for the GPU's, which takes
LayerNorm in float32.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import timm
import torch
from gpu_timing import header, headline
from results import command, save
from subjects import DEIT, OURS, SMALL
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from metala_vision.errors import UserError
from metala_vision.files import check_outputs
from metala_vision.kernels.depthwise_conv import library as conv_library
from metala_vision.kernels.gated_norm import library as norm_library
from metala_vision.layers import conv, metala


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Convolution and norm are nodes, and operators take gates, not the decays and keys made of
    them."""
    with (
        mock.patch.object(conv, "on_gpu", lambda x: True),
        mock.patch.object(conv_library, "wanted", lambda device: True),
        mock.patch.object(norm_library, "wanted", lambda device: True),
        mock.patch.object(metala, "takes_decays", lambda q: False),
    ):
        yield


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Of the forward graph's outputs beside the module's own."""
    found = []

    def count(graph, example):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        # Each once; a placeholder is an input or a weight, which is there anyway.
        saved = {node for node in output.args[0][1:] if getattr(node, "op", "") == "call_function"}
        tensors = [node.meta["val"] for node in saved]
        found.append(sum(t.nbytes for t in tensors if isinstance(t, Tensor)))
        return graph.forward

    backend = aot_autograd(
        fw_compiler=count, bw_compiler=lambda graph, example: graph.forward,
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(module, backend=backend, fullgraph=True)(x)
    (total,) = found
    return total


def of_model(name: str, size: int) -> tuple[int, int]:
    """Bytes of any batch, and of each image."""
    model = timm.create_model(name, img_size=size).train()
    two, four = (saved_bytes(model, torch.randn(B, 3, size, size)) for B in (2, 4))
    return 2 * two - four, (four - two) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[DEIT, OURS, *reversed(SMALL)])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    for name in arguments.models:
        if not timm.is_model(name):
            raise UserError(f"--models {name!r} is no model of timm or metala_vision")
    if arguments.batch < 1 or arguments.size < 16 or arguments.size % 16:
        raise UserError(
            "--batch must be >= 1 and --size a multiple of 16, "
            f"got --batch {arguments.batch} --size {arguments.size}"
        )
    check_outputs({"--out": arguments.out})
    head = header("saved")
    print(f"{headline(head)}: counted, batch {arguments.batch} at {arguments.size} px")
    rows = []
    for name in arguments.models:
        with as_on_a_gpu():
            fixed, image = of_model(name, arguments.size)
        mib = (fixed + arguments.batch * image) / 2**20
        tokens = (arguments.size // 16) ** 2
        rows.append({"model": name, "mib": mib, "token_bytes": image / tokens})
        ratio = mib / rows[0]["mib"]
        print(f"{name:28}{mib:9.0f} MiB  {image / tokens:9.0f} bytes a token  "
              f"{ratio:5.2f} of {rows[0]['model']}", flush=True)  # fmt: skip
    if arguments.out:
        fields = {"batch": arguments.batch, "size": arguments.size}
        save(arguments.out, {**head, **fields, "rows": rows})


if __name__ == "__main__":
    command(main)
