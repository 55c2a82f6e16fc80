"""LRU backbones: the time-invariant diagonal state space model.

Resurrecting Recurrent Neural Networks for Long Sequences, https://arxiv.org/abs/2303.06349, in both
directions as S5, https://arxiv.org/abs/2208.04933, has them. No vision backbone was published.
Written from the equations.
"""

import math
from functools import partial

from timm.models import register_model

from metala_vision.layers import LRUMixer

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class LRU(Backbone):
    """The shared backbone with the linear recurrent unit as its token mixer.

    Args:
        num_heads: groups of channels for several scans (split_heads); nothing else.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        r_min, r_max, max_phase: see LRUMixer.
        mlp_ratio: None gives the channel mixer what the token mixer leaves of 13 C^2 parameters a
            block: 7/3 in both directions, 3 in one.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        mlp_ratio: float | None = None,
        **kwargs,
    ) -> None:
        mixer = partial(
            LRUMixer,
            num_heads=num_heads,
            conv=conv,
            direction=direction,
            r_min=r_min,
            r_max=r_max,
            max_phase=max_phase,
        )
        if mlp_ratio is None:
            mlp_ratio = (7 if direction == "bidirectional" else 9) / 3
        super().__init__(mixer, mlp_ratio=mlp_ratio, **kwargs)


default_cfgs = generate_default_cfgs(
    four_sizes(
        "lru", "Resurrecting Recurrent Neural Networks for Long Sequences", "arXiv:2303.06349"
    )
)


@register_model
def lru_nano(pretrained: bool = False, **kwargs) -> LRU:
    """For 64-pixel images in patches of 8; the size of metala_nano, LRU."""
    return build(LRU, "lru_nano", pretrained, **{**NANO, **kwargs})


@register_model
def lru_tiny(pretrained: bool = False, **kwargs) -> LRU:
    """The size of metala_tiny, LRU."""
    return build(LRU, "lru_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def lru_small(pretrained: bool = False, **kwargs) -> LRU:
    """The size of metala_small, LRU."""
    return build(LRU, "lru_small", pretrained, **{**SMALL, **kwargs})


@register_model
def lru_base(pretrained: bool = False, **kwargs) -> LRU:
    """The size of metala_base, LRU."""
    return build(LRU, "lru_base", pretrained, **{**BASE, **kwargs})
