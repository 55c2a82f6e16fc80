"""MetaLA backbones.

MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map,
https://arxiv.org/abs/2411.10741 (NeurIPS 2024). Written from the paper's equations; its vision
models were not published, and the sizes named `_paper` are those that reproduce its parameter
counts, 6.1M and 23.7M.
"""

from functools import partial

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from metala_vision.layers import MetaLAMixer

from .backbone import Backbone


class MetaLA(Backbone):
    """The shared backbone with MetaLA as its token mixer.

    Args:
        num_heads: heads of the mixer; key width embed_dim / (2 num_heads).
        conv: "depthwise2d", "causal1d" or "none".
        direction: "forward", "backward" or "bidirectional".
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        **kwargs,
    ) -> None:
        mixer = partial(MetaLAMixer, num_heads=num_heads, conv=conv, direction=direction)
        super().__init__(mixer, **kwargs)


def _create_metala(variant: str, pretrained: bool, **kwargs) -> MetaLA:
    return build_model_with_cfg(MetaLA, variant, pretrained, **kwargs)  # pyright: ignore


def _cfg(size: int = 224, patch: int = 16, **kwargs) -> dict:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // patch, size // patch),
        "fixed_input_size": False,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map",
        "paper_ids": "arXiv:2411.10741",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "metala_nano": _cfg(size=64, patch=8, crop_pct=1.0),
        "metala_tiny": _cfg(),
        "metala_small": _cfg(),
        "metala_base": _cfg(),
        "metala_tiny_paper": _cfg(),
        "metala_small_paper": _cfg(),
    }
)

_NANO = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 2}
_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_PAPER = {"conv": "causal1d", "direction": "forward"}


@register_model
def metala_nano(pretrained: bool = False, **kwargs) -> MetaLA:
    """1.9M parameters at 1000 classes, for 64-pixel images in patches of 8."""
    return _create_metala("metala_nano", pretrained, **{**_NANO, **kwargs})


@register_model
def metala_tiny(pretrained: bool = False, **kwargs) -> MetaLA:
    """6.1M parameters, bidirectional, 3x3 convolution: the recommended small model."""
    return _create_metala("metala_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def metala_small(pretrained: bool = False, **kwargs) -> MetaLA:
    """23.8M parameters, bidirectional, 3x3 convolution."""
    return _create_metala("metala_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def metala_base(pretrained: bool = False, **kwargs) -> MetaLA:
    """Bidirectional, 3x3 convolution, the width of ViT-B."""
    return _create_metala("metala_base", pretrained, **{**_BASE, **kwargs})


@register_model
def metala_tiny_paper(pretrained: bool = False, **kwargs) -> MetaLA:
    """The paper's tiny size: causal convolution, forward recurrence; 6,113,704 parameters."""
    return _create_metala("metala_tiny_paper", pretrained, **{**_TINY, **_PAPER, **kwargs})


@register_model
def metala_small_paper(pretrained: bool = False, **kwargs) -> MetaLA:
    """The paper's small size: causal convolution, forward recurrence; 23,727,976 parameters."""
    return _create_metala("metala_small_paper", pretrained, **{**_SMALL, **_PAPER, **kwargs})
