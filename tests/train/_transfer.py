"""Small models, and runs of a few steps, of the tests of transfer learning."""

import json

import timm
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from metala_vision.build import create_model
from metala_vision.cli import main
from metala_vision.config import ModelConfig

NANO = ("--model", "metala_nano", "--img-size", "32", "--patch-size", "8")
SMALL = {"embed_dim": 32, "depth": 2}


def run_train(tree, run_dir, *flags, model=NANO, steps=3):
    """Weights before the first step, the weights of `last`, and its config.json."""
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [
        *model, "--data-dir", tree, "--run-dir", run_dir, "--workers", "0", "--batch-size", "12",
        "--epochs", "1", "--max-steps", steps, "--lr", "1e-2", "--warmup-epochs", "0", *flags,
    ]  # fmt: skip
    assert main(["train", *map(str, flags)]) == 0
    return load_file(run_dir / "last/model.safetensors"), json.loads(
        (run_dir / "last/config.json").read_text()
    )


def shipped(**kwargs):
    return timm.create_model("metala_nano", pretrained=True, num_classes=3, patch_size=8, **kwargs)


def small(family="metala", **config):
    """A model of that family, and its configuration."""
    kwargs = {**SMALL, "num_heads": 1}
    if family in ("lru", "hgrn", "mamba"):
        kwargs.pop("num_heads")
    config = ModelConfig(
        model=f"{family}_nano", img_size=32, patch_size=8, model_kwargs=kwargs, **config
    )
    return create_model(config, 3), config
