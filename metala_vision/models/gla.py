"""GLA backbones.

Gated Linear Attention Transformers with Hardware-Efficient Training,
https://arxiv.org/abs/2312.06635. The paper has no vision model; ViG, https://arxiv.org/abs/2405.18425,
is one on its recurrence. Written from the equations.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import GLAMixer

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class GLA(Backbone):
    """The shared backbone with gated linear attention as its token mixer.

    Args:
        num_heads: heads of the mixer; key width embed_dim / (2 num_heads).
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        shared_decay, average, norm, tau, rank: see GLAMixer.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        shared_decay: bool = True,
        average: bool = False,
        norm: str = "layer",
        tau: float = 16.0,
        rank: int = 16,
        **kwargs,
    ) -> None:
        mixer = partial(
            GLAMixer,
            num_heads=num_heads,
            conv=conv,
            direction=direction,
            shared_decay=shared_decay,
            average=average,
            norm=norm,
            tau=tau,
            rank=rank,
        )
        super().__init__(mixer, **kwargs)


default_cfgs = generate_default_cfgs(
    four_sizes(
        "gla",
        "Gated Linear Attention Transformers with Hardware-Efficient Training",
        "arXiv:2312.06635",
    )
)


@register_model
def gla_nano(pretrained: bool = False, **kwargs) -> GLA:
    """For 64-pixel images in patches of 8; the size of metala_nano, gated linear attention."""
    return build(GLA, "gla_nano", pretrained, **{**NANO, **kwargs})


@register_model
def gla_tiny(pretrained: bool = False, **kwargs) -> GLA:
    """The size of metala_tiny, gated linear attention."""
    return build(GLA, "gla_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def gla_small(pretrained: bool = False, **kwargs) -> GLA:
    """The size of metala_small, gated linear attention."""
    return build(GLA, "gla_small", pretrained, **{**SMALL, **kwargs})


@register_model
def gla_base(pretrained: bool = False, **kwargs) -> GLA:
    """The size of metala_base, gated linear attention."""
    return build(GLA, "gla_base", pretrained, **{**BASE, **kwargs})
