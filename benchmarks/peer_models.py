"""Adaptors for `--peer`: models of others, from checkouts of their repositories.

    git clone https://github.com/hustvl/ViG                 (tried with dfb9d32)
    git clone https://github.com/yibozhong/fla-zoo          (tried with 9bea27b)
    METALA_VISION_PEERS=FOLDER python benchmarks/models.py \\
        --peer vig_tiny=benchmarks/peer_models.py:vig_tiny \\
        --peer flazoo_gla=benchmarks/peer_models.py:flazoo_gla

FOLDER holds both checkouts. ViG brings its own flash-linear-attention and needs einops, opt_einsum
and transformers; fla-zoo needs flash-linear-attention (0.6.0), einops and transformers (5). Each
runs in a process of its own: their modules share names. Nothing of theirs is in this repository.
"""

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metala_vision.errors import UserError
from metala_vision.transfer import hidden_kernels

FOLDER = "METALA_VISION_PEERS"


def checkout(name: str) -> Path:
    """The folder of a repository's checkout.

    Raises:
        UserError: where there is none.
    """
    if not os.environ.get(FOLDER):
        raise UserError(f"{FOLDER} must name the folder that holds a checkout of {name}")
    path = Path(os.environ[FOLDER]).resolve() / name
    if not path.is_dir():
        raise UserError(f"{FOLDER}={os.environ[FOLDER]} holds no checkout called {name}")
    return path


def load(module: str, name: str) -> Any:
    """A module of a checkout.

    Raises:
        UserError: where it needs a package that is not installed.
    """
    try:
        with hidden_kernels():  # transformers looks for a package of that name
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs the package {error.name}, which is not installed") from error


def refuse_the_others_library(name: str, root: Path, inside: bool) -> None:
    """A UserError where a flash-linear-attention is imported that does not lie inside of root, or
    that does."""
    file = getattr(sys.modules.get("fla"), "__file__", None)
    if file and Path(file).resolve().is_relative_to(root) != inside:
        raise UserError(f"{name} needs a process of its own: {file} is imported, not its library")


def vig_tiny(size: int) -> nn.Module:
    """ViG-T, arXiv 2405.18425, as its configs/vig/vig-t.yaml sets it; no stochastic depth."""
    root = checkout("ViG")
    refuse_the_others_library("ViG", root, inside=True)
    # Its kernels read numbers of their modules, which Triton 3 takes only when told so.
    os.environ.setdefault("TRITON_ALLOW_NON_CONSTEXPR_GLOBALS", "1")
    sys.path[:0] = [str(root / "classification/models"), str(root / "flash-linear-attention")]
    # It imports a function of causal_conv1d, a CUDA extension, and calls it nowhere.
    extension = types.ModuleType("causal_conv1d.causal_conv1d_interface")
    extension.CausalConv1dFn = None  # type: ignore[attr-defined]
    sys.modules.setdefault("causal_conv1d", types.ModuleType("causal_conv1d"))
    sys.modules.setdefault(extension.__name__, extension)
    return load("vig", "ViG").ViG(
        img_size=size, embed_dim=192, num_heads=3, depth=12, expand_k=0.5, expand_v=1.0,
        attn_model="fused_chunk", patch_embed_version="v2", if_cls_token=False,
        if_abs_pos_embed=True, use_swiglu=True, use_out_act=True, use_out_gate=False,
        classification_mode="avgpool", drop_path_rate=0.0,
    )  # fmt: skip


class Logits(nn.Module):
    """A transformers model that gives its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def flazoo_gla(size: int) -> nn.Module:
    """fla-zoo's GLA backbone in DeiT-tiny's width and depth, both directions ("bi-scan")."""
    root = checkout("fla-zoo")
    refuse_the_others_library("fla-zoo", root.with_name("ViG"), inside=False)
    # Its own __init__ files import every model, among them some that today's library lacks.
    for name in ("flazoo", "flazoo.models", "flazoo.models.vision"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    settings = load("flazoo.models.vision.gla.configuration_gla", "fla-zoo").GLAVisionConfig(
        hidden_size=192, num_hidden_layers=12, num_heads=3, mlp_dim=768, image_size=size,
        patch_size=16, num_classes=1000, scan_type="bi-scan",
    )  # fmt: skip
    models = load("flazoo.models.vision.gla.modeling_gla", "fla-zoo")
    # What transformers 5 sets in a call that models of version 4 do not make.
    models.PreTrainedModel.all_tied_weights_keys = {}
    return Logits(models.GLAForImageClassification(settings))
