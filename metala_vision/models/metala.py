"""MetaLA backbones.

MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map,
https://arxiv.org/abs/2411.10741 (NeurIPS 2024). Written from the paper's equations; its vision
models were not published, and the sizes named `_paper` are those that reproduce its parameter
counts, 6.1M and 23.7M.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import MetaLAMixer

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, cfg, four_sizes, generate_default_cfgs


class MetaLA(Backbone):
    """The shared backbone with MetaLA as its token mixer.

    Args:
        num_heads: heads of the mixer; key width embed_dim / (2 num_heads).
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
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


PAPER = (
    "MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map",
    "arXiv:2411.10741",
)
_cfg = partial(cfg, *PAPER)

default_cfgs = generate_default_cfgs(
    {
        **four_sizes("metala", *PAPER),
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

_CAUSAL = {"conv": "causal1d", "direction": "forward"}
_CROSS = {"scans": ("raster", "column")}
_HILBERT = {"scans": "hilbert"}
_SNAKE = {"scans": "snake"}


@register_model
def metala_nano(pretrained: bool = False, **kwargs) -> MetaLA:
    """1.9M parameters at 1000 classes, for 64-pixel images in patches of 8."""
    return build(MetaLA, "metala_nano", pretrained, **{**NANO, **kwargs})


@register_model
def metala_tiny(pretrained: bool = False, **kwargs) -> MetaLA:
    """6.1M parameters, bidirectional, 3x3 convolution: the recommended small model."""
    return build(MetaLA, "metala_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def metala_small(pretrained: bool = False, **kwargs) -> MetaLA:
    """23.8M parameters, bidirectional, 3x3 convolution."""
    return build(MetaLA, "metala_small", pretrained, **{**SMALL, **kwargs})


@register_model
def metala_base(pretrained: bool = False, **kwargs) -> MetaLA:
    """Bidirectional, 3x3 convolution, the width of ViT-B."""
    return build(MetaLA, "metala_base", pretrained, **{**BASE, **kwargs})


@register_model
def metala_tiny_paper(pretrained: bool = False, **kwargs) -> MetaLA:
    """The paper's tiny size: causal convolution, forward recurrence; 6,113,704 parameters."""
    return build(MetaLA, "metala_tiny_paper", pretrained, **{**TINY, **_CAUSAL, **kwargs})


@register_model
def metala_small_paper(pretrained: bool = False, **kwargs) -> MetaLA:
    """The paper's small size: causal convolution, forward recurrence; 23,727,976 parameters."""
    return build(MetaLA, "metala_small_paper", pretrained, **{**SMALL, **_CAUSAL, **kwargs})


@register_model
def metala_nano_causal(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, the causal convolution, forward only, mean pool."""
    return build(MetaLA, "metala_nano_causal", pretrained, **{**NANO, **_CAUSAL, **kwargs})


@register_model
def metala_nano_cross(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, rows and columns scanned in turn, layer by layer."""
    return build(MetaLA, "metala_nano_cross", pretrained, **{**NANO, **_CROSS, **kwargs})


@register_model
def metala_nano_hilbert(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, scanned along a Hilbert curve."""
    return build(MetaLA, "metala_nano_hilbert", pretrained, **{**NANO, **_HILBERT, **kwargs})


@register_model
def metala_nano_snake(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_nano, scanned row by row, there and back."""
    return build(MetaLA, "metala_nano_snake", pretrained, **{**NANO, **_SNAKE, **kwargs})


@register_model
def metala_tiny_causal(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, the same model as metala_tiny_paper."""
    return build(MetaLA, "metala_tiny_causal", pretrained, **{**TINY, **_CAUSAL, **kwargs})


@register_model
def metala_tiny_cross(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, rows and columns scanned in turn, layer by layer."""
    return build(MetaLA, "metala_tiny_cross", pretrained, **{**TINY, **_CROSS, **kwargs})


@register_model
def metala_tiny_hilbert(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, scanned along a Hilbert curve."""
    return build(MetaLA, "metala_tiny_hilbert", pretrained, **{**TINY, **_HILBERT, **kwargs})


@register_model
def metala_tiny_snake(pretrained: bool = False, **kwargs) -> MetaLA:
    """metala_tiny, scanned row by row, there and back."""
    return build(MetaLA, "metala_tiny_snake", pretrained, **{**TINY, **_SNAKE, **kwargs})
