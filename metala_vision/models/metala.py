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
        self_aug, key, tau, shared_decay: see MetaLAMixer.
        mlp_ratio: None is 3, less 1/6 for a second decay and for a projected key each: the channel
            mixer pays for their projections, and the size stays.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        self_aug: bool = True,
        key: str = "decay",
        tau: float = 16.0,
        shared_decay: bool = True,
        mlp_ratio: float | None = None,
        **kwargs,
    ) -> None:
        mixer = partial(
            MetaLAMixer,
            num_heads=num_heads,
            conv=conv,
            direction=direction,
            self_aug=self_aug,
            key=key,
            tau=tau,
            shared_decay=shared_decay,
        )
        if mlp_ratio is None:
            mlp_ratio = 3.0 - (int(not shared_decay) + int(key == "projected")) / 6
        super().__init__(mixer, mlp_ratio=mlp_ratio, **kwargs)


def checkpoint_filter_fn(state_dict: dict, model: MetaLA) -> dict:
    """The weights of a checkpoint under our names: unwrapped, without the prefixes of wrappers."""
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    cleaned = {}
    for name, value in state_dict.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        cleaned[name] = value
    return cleaned


def _create_metala(variant: str, pretrained: bool, **kwargs) -> MetaLA:
    depth = kwargs.get("depth", 12)
    quarters = tuple(sorted({max(1, depth * i // 4) - 1 for i in (1, 2, 3, 4)}))
    return build_model_with_cfg(  # pyright: ignore[reportReturnType]
        MetaLA,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={
            "out_indices": quarters,
            "feature_cls": "getter",
            "flatten_sequential": True,
        },
        **kwargs,
    )


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
        "metala_nano_causal": _cfg(size=64, patch=8, crop_pct=1.0),
        "metala_nano_cross": _cfg(size=64, patch=8, crop_pct=1.0),
        "metala_nano_hilbert": _cfg(size=64, patch=8, crop_pct=1.0),
        "metala_nano_snake": _cfg(size=64, patch=8, crop_pct=1.0),
        "metala_tiny_causal": _cfg(),
        "metala_tiny_cross": _cfg(),
        "metala_tiny_hilbert": _cfg(),
        "metala_tiny_snake": _cfg(),
    }
)

_NANO = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 2}
_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_CAUSAL = {"conv": "causal1d", "direction": "forward"}
_CROSS = {"scans": ("raster", "column")}
_HILBERT = {"scans": "hilbert"}
_SNAKE = {"scans": "snake"}


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
    return _create_metala("metala_tiny_paper", pretrained, **{**_TINY, **_CAUSAL, **kwargs})


@register_model
def metala_small_paper(pretrained: bool = False, **kwargs) -> MetaLA:
    """The paper's small size: causal convolution, forward recurrence; 23,727,976 parameters."""
    return _create_metala("metala_small_paper", pretrained, **{**_SMALL, **_CAUSAL, **kwargs})


@register_model
def metala_nano_causal(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, the causal convolution, forward only, mean pool."""
    return _create_metala("metala_nano_causal", pretrained, **{**_NANO, **_CAUSAL, **kwargs})


@register_model
def metala_nano_cross(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, rows and columns scanned in turn, layer by layer."""
    return _create_metala("metala_nano_cross", pretrained, **{**_NANO, **_CROSS, **kwargs})


@register_model
def metala_nano_hilbert(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, scanned along a Hilbert curve."""
    return _create_metala("metala_nano_hilbert", pretrained, **{**_NANO, **_HILBERT, **kwargs})


@register_model
def metala_nano_snake(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, scanned row by row, there and back."""
    return _create_metala("metala_nano_snake", pretrained, **{**_NANO, **_SNAKE, **kwargs})


@register_model
def metala_tiny_causal(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, the same model as metala_tiny_paper."""
    return _create_metala("metala_tiny_causal", pretrained, **{**_TINY, **_CAUSAL, **kwargs})


@register_model
def metala_tiny_cross(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, rows and columns scanned in turn, layer by layer."""
    return _create_metala("metala_tiny_cross", pretrained, **{**_TINY, **_CROSS, **kwargs})


@register_model
def metala_tiny_hilbert(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, scanned along a Hilbert curve."""
    return _create_metala("metala_tiny_hilbert", pretrained, **{**_TINY, **_HILBERT, **kwargs})


@register_model
def metala_tiny_snake(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, scanned row by row, there and back."""
    return _create_metala("metala_tiny_snake", pretrained, **{**_TINY, **_SNAKE, **kwargs})
