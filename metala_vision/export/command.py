"""`metala-vision export CHECKPOINT --format torch|onnx|aoti --out FILE`."""

import argparse
from pathlib import Path

from metala_vision.errors import UserError

from .wanted import DYNAMIC, OPSETS, SUFFIXES, Export

HOW = {
    "torch": ("import torch", "model = torch.export.load({file!r}).module()",
              "{output} = model(torch.zeros({shape}))"),
    "onnx": ("import numpy, onnxruntime", "session = onnxruntime.InferenceSession({file!r})",
             "{output} = session.run(None, {{'images': numpy.zeros(({shape}), 'float32')}})[0]"),
    "aoti": ("import torch", "model = torch._inductor.aoti_load_package({file!r})",
             "{output} = model(torch.zeros({shape}))"),
}  # fmt: skip


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
