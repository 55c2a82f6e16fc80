"""Softmax attention in the shared backbone: the control.

Attention Is All You Need, https://arxiv.org/abs/1706.03762. The same patches, blocks, gated linear
units and mean pool as metala_*, so that a difference is one of token mixer; DeiT as published is
timm's deit_tiny_patch16_224.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import AttentionMixer

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class Attention(Backbone):
    """The shared backbone with softmax attention as its token mixer.

    Args:
        num_heads: heads of the mixer.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        pos_embed: as Backbone, "sincos2d" here: attention alone is blind to order.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        pos_embed: str = "sincos2d",
        **kwargs,
    ) -> None:
        mixer = partial(AttentionMixer, num_heads=num_heads, conv=conv, direction=direction)
        super().__init__(mixer, pos_embed=pos_embed, **kwargs)


default_cfgs = generate_default_cfgs(
    four_sizes("attention", "Attention Is All You Need", "arXiv:1706.03762")
)


@register_model
def attention_nano(pretrained: bool = False, **kwargs) -> Attention:
    """For 64-pixel images in patches of 8; the size of metala_nano, softmax attention."""
    return build(Attention, "attention_nano", pretrained, **{**NANO, **kwargs})


@register_model
def attention_tiny(pretrained: bool = False, **kwargs) -> Attention:
    """The size of metala_tiny, softmax attention."""
    return build(Attention, "attention_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def attention_small(pretrained: bool = False, **kwargs) -> Attention:
    """The size of metala_small, softmax attention."""
    return build(Attention, "attention_small", pretrained, **{**SMALL, **kwargs})


@register_model
def attention_base(pretrained: bool = False, **kwargs) -> Attention:
    """The size of metala_base, softmax attention."""
    return build(Attention, "attention_base", pretrained, **{**BASE, **kwargs})
