"""Adaptors for `--peer`: models of others, from checkouts of their repositories.

    git clone https://github.com/hustvl/ViG                 (tried with dfb9d32)
    git clone https://github.com/hustvl/Vim                 (tried with dd0358a)
    git clone https://github.com/yibozhong/fla-zoo          (tried with 9bea27b)
    export METALA_VISION_PEERS=FOLDER                       (that holds them)
    python benchmarks/peer_models.py vim_tiny               (builds Vim's extensions, minutes)
    python benchmarks/models.py run --out models.json \\
        --peer vig_tiny=benchmarks/peer_models.py:vig_tiny \\
        --peer vim_tiny=benchmarks/peer_models.py:vim_tiny \\
        --peer flazoo_gla=benchmarks/peer_models.py:flazoo_gla

All need einops and transformers (5). ViG brings its own flash-linear-attention and needs
opt_einsum; fla-zoo needs flash-linear-attention (0.6.0); Vim builds its CUDA extensions for this
GPU once, by nvcc and ninja, which takes longer than a benchmark's process may: build it first. Each
runs in a process of its own: their modules share names. benchmarks/gpu.py takes --peer too.
Nothing of theirs is in this repository.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from results import command
from torch import Tensor, nn

from metala_vision.errors import UserError, one_line
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
        if error.name == module:
            raise UserError(f"the checkout of {name} has no module {module}") from error
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
    stand_ins = {n: types.ModuleType(n) for n in (CONV, f"{CONV}.causal_conv1d_interface")}
    for name, module in stand_ins.items():
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__["CausalConv1dFn"] = None
    with mock.patch.dict(sys.modules, stand_ins):
        vig = load("vig", "ViG")
    return vig.ViG(
        img_size=size, embed_dim=192, num_heads=3, depth=12, expand_k=0.5, expand_v=1.0,
        attn_model="fused_chunk", patch_embed_version="v2", if_cls_token=False,
        if_abs_pos_embed=True, use_swiglu=True, use_out_act=True, use_out_gate=False,
        classification_mode="avgpool", drop_path_rate=0.0,
    )  # fmt: skip


CONV = "causal_conv1d"
# What Vim's CUDA sources call of CUB, and CUDA 13's has no more.
CUB = """#pragma once
#if defined(__CUDACC__) && __CUDACC_VER_MAJOR__ >= 13
namespace cub {
__device__ __forceinline__ void CTA_SYNC() { __syncthreads(); }
__device__ __forceinline__ unsigned LaneId() {
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
}
#endif
"""


def extension(name: str, folder: Path) -> None:
    """A CUDA extension of Vim's, imported under its name; built if it is not yet, in torch's folder
    for extensions (TORCH_EXTENSIONS_DIR). An installed one may be another release's.

    Raises:
        UserError: where there is no compiler that builds it.
    """
    from torch.utils import cpp_extension  # looks for a compiler, and says what it found

    folder_of_build = Path(cpp_extension._get_build_directory(name, False))
    built, lock = folder_of_build / f"{name}.so", folder_of_build / "lock"
    if built.is_file() and not lock.exists():
        spec = importlib.util.spec_from_file_location(name, built)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        return
    if lock.exists():
        raise UserError(f"{lock}: {name} is being built, or its build was killed; then remove it")
    if not cpp_extension.CUDA_HOME or not Path(cpp_extension.CUDA_HOME, "bin/nvcc").is_file():
        raise UserError(f"Vim needs {name}, and there is no nvcc to build it")
    if not (torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST")):
        raise UserError(
            f"Vim needs {name}, and there is no GPU to build it for "
            "(TORCH_CUDA_ARCH_LIST=9.0 names one)"
        )
    header = folder_of_build / "metala_vision_cub.h"
    header.write_text(CUB)
    types_ = ("HALF", "BFLOAT16")
    lifted = [f"-U__CUDA_NO_{t}_{what}__" for t in types_ for what in ("OPERATORS", "CONVERSIONS")]
    lifted += [f"-U__CUDA_NO_BFLOAT162_{what}__" for what in ("OPERATORS", "CONVERSIONS")]
    sources = sorted(str(file) for ending in ("cpp", "cu") for file in folder.glob(f"*.{ending}"))
    try:
        sys.modules[name] = cpp_extension.load(
            name, sources,
            extra_include_paths=[str(folder)], extra_cflags=["-O3", "-std=c++17"],
            extra_cuda_cflags=[
                "-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda",
                "--use_fast_math", "-include", str(header), *lifted,
            ],
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise UserError(f"Vim's {name} does not build: {one_line(error)}") from error


def without_init(name: str, folder: Path) -> None:
    """A package of a checkout, its __init__ not run."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def vim_tiny(size: int) -> nn.Module:
    """Vim-T, arXiv 2401.09417, as its scripts/pt-vim-t.sh trains it; no stochastic depth."""
    root = checkout("Vim")
    extension("causal_conv1d_cuda", root / "causal-conv1d/csrc")
    extension("selective_scan_cuda", root / "mamba-1p1p1/csrc/selective_scan")
    # Its __init__ files import language models and their generation, which today's transformers
    # does not fit.
    without_init("mamba_ssm", root / "mamba-1p1p1/mamba_ssm")
    for name, names in (
        ("generation", ("GenerationMixin",)),
        ("hf", ("load_config_hf", "load_state_dict_hf")),
    ):
        module = types.ModuleType(f"mamba_ssm.utils.{name}")
        module.__dict__.update(dict.fromkeys(names))
        sys.modules[module.__name__] = module
    sys.path[:0] = [str(root / "vim"), str(root / "causal-conv1d")]
    return load("models_mamba", "Vim").VisionMamba(
        img_size=size, patch_size=16, embed_dim=192, depth=24, rms_norm=True,
        residual_in_fp32=True, fused_add_norm=True, final_pool_type="mean", if_abs_pos_embed=True,
        bimamba_type="v2", if_cls_token=True, if_divide_out=True, use_middle_cls_token=True,
        drop_path_rate=0.0,
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
        without_init(name, root.joinpath(*name.split(".")))
    settings = load("flazoo.models.vision.gla.configuration_gla", "fla-zoo").GLAVisionConfig(
        hidden_size=192, num_hidden_layers=12, num_heads=3, mlp_dim=768, image_size=size,
        patch_size=16, num_classes=1000, scan_type="bi-scan",
    )  # fmt: skip
    models = load("flazoo.models.vision.gla.modeling_gla", "fla-zoo")
    # What transformers 5 sets in a call that models of version 4 do not make.
    models.PreTrainedModel.all_tied_weights_keys = {}
    return Logits(models.GLAForImageClassification(settings))


BUILDERS = {build.__name__: build for build in (vig_tiny, vim_tiny, flazoo_gla)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=BUILDERS, help="build it for 224 px")
    model = BUILDERS[parser.parse_args().model](224)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")


if __name__ == "__main__":
    command(main)
