"""EVA backbones: attention via control variates.

Efficient Attention via Control Variates, https://arxiv.org/abs/2302.04542. Written from the
equations. Not EVA, the masked image models of that name, https://arxiv.org/abs/2211.07636, which
are timm's.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import EVAAttentionMixer
from metala_vision.layers.mixer import check_sizes

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class EVAAttention(Backbone):
    """The shared backbone with EVA as its token mixer.

    Args:
        num_heads: heads of the mixer.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "bidirectional".
        window, landmarks, noise, exact_partition, count_tokens: see EVAAttentionMixer.
        pos_embed: as Backbone, "sincos2d" here: groups alone are blind to order.
        mlp_ratio: None gives the channel mixer what the token mixer leaves of 13 C^2 parameters a
            block.
        embed_dim: C.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        window: int = 7,
        landmarks: int = 49,
        noise: bool = True,
        exact_partition: bool = False,
        count_tokens: bool = False,
        pos_embed: str = "sincos2d",
        mlp_ratio: float | None = None,
        embed_dim: int = 192,
        **kwargs,
    ) -> None:
        mixer = partial(
            EVAAttentionMixer,
            num_heads=num_heads,
            conv=conv,
            direction=direction,
            window=window,
            landmarks=landmarks,
            noise=noise,
            exact_partition=exact_partition,
            count_tokens=count_tokens,
        )
        if mlp_ratio is None:
            check_sizes(embed_dim=embed_dim, num_heads=num_heads, window=window)
            # W_q and W_k of a head, and the relative positions of a window
            own = 2 * (embed_dim / num_heads) ** 2 + num_heads * (2 * window - 1) ** 2
            mlp_ratio = max(9 - own / embed_dim**2, 3) / 3
        super().__init__(
            mixer, mlp_ratio=mlp_ratio, embed_dim=embed_dim, pos_embed=pos_embed, **kwargs
        )


default_cfgs = generate_default_cfgs(
    four_sizes("eva_attention", "Efficient Attention via Control Variates", "arXiv:2302.04542")
)


@register_model
def eva_attention_nano(pretrained: bool = False, **kwargs) -> EVAAttention:
    """For 64-pixel images in patches of 8; the size of metala_nano, EVA in windows of 4."""
    nano = {**NANO, "window": 4, "landmarks": 16}
    return build(EVAAttention, "eva_attention_nano", pretrained, **{**nano, **kwargs})


@register_model
def eva_attention_tiny(pretrained: bool = False, **kwargs) -> EVAAttention:
    """The size of metala_tiny, EVA."""
    return build(EVAAttention, "eva_attention_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def eva_attention_small(pretrained: bool = False, **kwargs) -> EVAAttention:
    """The size of metala_small, EVA."""
    return build(EVAAttention, "eva_attention_small", pretrained, **{**SMALL, **kwargs})


@register_model
def eva_attention_base(pretrained: bool = False, **kwargs) -> EVAAttention:
    """The size of metala_base, EVA."""
    return build(EVAAttention, "eva_attention_base", pretrained, **{**BASE, **kwargs})
