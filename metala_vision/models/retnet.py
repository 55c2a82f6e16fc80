"""RetNet backbones.

Retentive Network: A Successor to Transformer for Large Language Models,
https://arxiv.org/abs/2307.08621, with its constant decay by head or TransNormerLLM's,
https://arxiv.org/abs/2307.14995. No vision model was published. Written from the equations.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import RetNetMixer

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class RetNet(Backbone):
    """The shared backbone with retention as its token mixer.

    Args:
        num_heads: heads of the mixer; key width embed_dim / num_heads.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        value_ratio, decay, rotary, norm: see RetNetMixer.
        depth: number of blocks.
        mlp_ratio: None gives the channel mixer what the token mixer leaves of 13 C^2 parameters a
            block: 8/3 for value_ratio 1, 5/3 for 2.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        value_ratio: int = 1,
        decay: str = "retnet",
        rotary: str = "scan",
        norm: str = "layer",
        depth: int = 12,
        mlp_ratio: float | None = None,
        **kwargs,
    ) -> None:
        mixers = [
            partial(
                RetNetMixer,
                num_heads=num_heads,
                conv=conv,
                direction=direction,
                value_ratio=value_ratio,
                decay=decay,
                layer=layer,
                depth=depth,
                rotary=rotary,
                norm=norm,
            )
            for layer in range(depth)
        ]
        if mlp_ratio is None:
            mlp_ratio = max(11 - 3 * value_ratio, 1) / 3
        super().__init__(mixers, depth=depth, mlp_ratio=mlp_ratio, **kwargs)


default_cfgs = generate_default_cfgs(
    four_sizes(
        "retnet",
        "Retentive Network: A Successor to Transformer for Large Language Models",
        "arXiv:2307.08621",
    )
)


@register_model
def retnet_nano(pretrained: bool = False, **kwargs) -> RetNet:
    """For 64-pixel images in patches of 8; the size of metala_nano, retention."""
    return build(RetNet, "retnet_nano", pretrained, **{**NANO, **kwargs})


@register_model
def retnet_tiny(pretrained: bool = False, **kwargs) -> RetNet:
    """The size of metala_tiny, retention."""
    return build(RetNet, "retnet_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def retnet_small(pretrained: bool = False, **kwargs) -> RetNet:
    """The size of metala_small, retention."""
    return build(RetNet, "retnet_small", pretrained, **{**SMALL, **kwargs})


@register_model
def retnet_base(pretrained: bool = False, **kwargs) -> RetNet:
    """The size of metala_base, retention."""
    return build(RetNet, "retnet_base", pretrained, **{**BASE, **kwargs})
