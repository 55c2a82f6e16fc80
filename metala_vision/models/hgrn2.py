"""HGRN2 backbones.

HGRN2: Gated Linear RNNs with State Expansion, https://arxiv.org/abs/2404.07904. Written from the
equations; its vision model was not released.
"""

from functools import partial

from timm.models import register_model
from torch import Tensor

from metala_vision.layers import BoundedBlock, HGRN2Mixer, LowerBounds

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class HGRN2(Backbone):
    """The shared backbone with HGRN2 as its token mixer, and the layers' lower bounds.

    Args:
        num_heads: heads of the mixer; width embed_dim / num_heads.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        depth, embed_dim, device, dtype, **kwargs: those of Backbone; an unknown one raises
            TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        depth: int = 12,
        embed_dim: int = 192,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        mixer = partial(HGRN2Mixer, num_heads=num_heads, conv=conv, direction=direction)
        super().__init__(
            mixer, depth=depth, embed_dim=embed_dim, block_layer=BoundedBlock, device=device,
            dtype=dtype, **kwargs,
        )  # fmt: skip
        self.lower_bounds = LowerBounds(depth, embed_dim, device=device, dtype=dtype)

    def _lower_bounds(self) -> Tensor | None:
        return self.lower_bounds()


default_cfgs = generate_default_cfgs(
    four_sizes("hgrn2", "HGRN2: Gated Linear RNNs with State Expansion", "arXiv:2404.07904")
)


@register_model
def hgrn2_nano(pretrained: bool = False, **kwargs) -> HGRN2:
    """For 64-pixel images in patches of 8; the size of metala_nano, HGRN2."""
    return build(HGRN2, "hgrn2_nano", pretrained, **{**NANO, **kwargs})


@register_model
def hgrn2_tiny(pretrained: bool = False, **kwargs) -> HGRN2:
    """The size of metala_tiny, HGRN2."""
    return build(HGRN2, "hgrn2_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def hgrn2_small(pretrained: bool = False, **kwargs) -> HGRN2:
    """The size of metala_small, HGRN2."""
    return build(HGRN2, "hgrn2_small", pretrained, **{**SMALL, **kwargs})


@register_model
def hgrn2_base(pretrained: bool = False, **kwargs) -> HGRN2:
    """The size of metala_base, HGRN2."""
    return build(HGRN2, "hgrn2_base", pretrained, **{**BASE, **kwargs})
