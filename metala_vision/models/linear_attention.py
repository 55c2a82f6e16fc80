"""Linear attention backbones, undecayed and kernelised.

Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention,
https://arxiv.org/abs/2006.16236; the row that the MetaLA paper calls LinFormer. Written from the
equations.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import LinearAttentionMixer

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class LinearAttention(Backbone):
    """The shared backbone with undecayed linear attention as its token mixer.

    Args:
        num_heads: heads of the mixer.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        feature_map: "elu" (elu + 1) or "relu".
        pos_embed: as Backbone, "sincos2d" here: linear attention alone is blind to order.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        feature_map: str = "elu",
        pos_embed: str = "sincos2d",
        **kwargs,
    ) -> None:
        mixer = partial(
            LinearAttentionMixer,
            num_heads=num_heads,
            conv=conv,
            direction=direction,
            feature_map=feature_map,
        )
        super().__init__(mixer, pos_embed=pos_embed, **kwargs)


default_cfgs = generate_default_cfgs(
    four_sizes(
        "linear_attention",
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        "arXiv:2006.16236",
    )
)


@register_model
def linear_attention_nano(pretrained: bool = False, **kwargs) -> LinearAttention:
    """For 64-pixel images in patches of 8; the size of metala_nano, linear attention."""
    return build(LinearAttention, "linear_attention_nano", pretrained, **{**NANO, **kwargs})


@register_model
def linear_attention_tiny(pretrained: bool = False, **kwargs) -> LinearAttention:
    """The size of metala_tiny, linear attention."""
    return build(LinearAttention, "linear_attention_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def linear_attention_small(pretrained: bool = False, **kwargs) -> LinearAttention:
    """The size of metala_small, linear attention."""
    return build(LinearAttention, "linear_attention_small", pretrained, **{**SMALL, **kwargs})


@register_model
def linear_attention_base(pretrained: bool = False, **kwargs) -> LinearAttention:
    """The size of metala_base, linear attention."""
    return build(LinearAttention, "linear_attention_base", pretrained, **{**BASE, **kwargs})
