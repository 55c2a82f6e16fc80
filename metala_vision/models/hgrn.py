"""HGRN backbones.

Hierarchically Gated Recurrent Neural Network for Sequence Modeling,
https://arxiv.org/abs/2311.04823. Written from the equations; the published vision model has patches
of 14 pixels.
"""

from functools import partial

from timm.models import register_model
from torch import Tensor

from metala_vision.layers import BoundedBlock, HGRNMixer, LowerBounds

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class HGRN(Backbone):
    """The shared backbone with HGRN as its token mixer, and the layers' lower bounds.

    Args:
        num_heads: groups of channels for several scans (split_heads); nothing else.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        mlp_ratio: 2 as published: the token mixer has 7 C^2 of the 13 C^2 parameters of a block.
        depth, embed_dim, device, dtype, **kwargs: those of Backbone; an unknown one raises
            TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        mlp_ratio: float = 2.0,
        depth: int = 12,
        embed_dim: int = 192,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        mixer = partial(HGRNMixer, num_heads=num_heads, conv=conv, direction=direction)
        super().__init__(
            mixer, mlp_ratio=mlp_ratio, depth=depth, embed_dim=embed_dim, block_layer=BoundedBlock,
            device=device, dtype=dtype, **kwargs,
        )  # fmt: skip
        self.lower_bounds = LowerBounds(depth, embed_dim, device=device, dtype=dtype)

    def _lower_bounds(self) -> Tensor | None:
        return self.lower_bounds()


default_cfgs = generate_default_cfgs(
    four_sizes(
        "hgrn",
        "Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
        "arXiv:2311.04823",
    )
)


@register_model
def hgrn_nano(pretrained: bool = False, **kwargs) -> HGRN:
    """For 64-pixel images in patches of 8; the size of metala_nano, HGRN."""
    return build(HGRN, "hgrn_nano", pretrained, **{**NANO, **kwargs})


@register_model
def hgrn_tiny(pretrained: bool = False, **kwargs) -> HGRN:
    """The size of metala_tiny, HGRN."""
    return build(HGRN, "hgrn_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def hgrn_small(pretrained: bool = False, **kwargs) -> HGRN:
    """The size of metala_small, HGRN."""
    return build(HGRN, "hgrn_small", pretrained, **{**SMALL, **kwargs})


@register_model
def hgrn_base(pretrained: bool = False, **kwargs) -> HGRN:
    """The size of metala_base, HGRN."""
    return build(HGRN, "hgrn_base", pretrained, **{**BASE, **kwargs})
