"""ReGLA backbones: gated linear attention with exponential features and a refined gate.

ReGLA: Refining Gated Linear Attention, https://arxiv.org/abs/2502.01578. No vision model was
published. Written from the equations; what is second hand of them, ReGLAMixer tells.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import ReGLAMixer

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class ReGLA(Backbone):
    """The shared backbone with ReGLA as its token mixer.

    Args:
        num_heads: heads of the mixer; width of keys and values embed_dim / num_heads.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        gate_bias, refine: see ReGLAMixer.
        mlp_ratio: None gives the channel mixer what the token mixer leaves of 13 C^2 parameters a
            block: 7/3, without the refining gate 8/3.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        gate_bias: float = 0.0,
        refine: bool = True,
        mlp_ratio: float | None = None,
        **kwargs,
    ) -> None:
        mixer = partial(
            ReGLAMixer,
            num_heads=num_heads,
            conv=conv,
            direction=direction,
            gate_bias=gate_bias,
            refine=refine,
        )
        if mlp_ratio is None:
            mlp_ratio = (7 if refine else 8) / 3
        super().__init__(mixer, mlp_ratio=mlp_ratio, **kwargs)


default_cfgs = generate_default_cfgs(
    four_sizes("regla", "ReGLA: Refining Gated Linear Attention", "arXiv:2502.01578")
)


@register_model
def regla_nano(pretrained: bool = False, **kwargs) -> ReGLA:
    """For 64-pixel images in patches of 8; the size of metala_nano, ReGLA."""
    return build(ReGLA, "regla_nano", pretrained, **{**NANO, **kwargs})


@register_model
def regla_tiny(pretrained: bool = False, **kwargs) -> ReGLA:
    """The size of metala_tiny, ReGLA."""
    return build(ReGLA, "regla_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def regla_small(pretrained: bool = False, **kwargs) -> ReGLA:
    """The size of metala_small, ReGLA."""
    return build(ReGLA, "regla_small", pretrained, **{**SMALL, **kwargs})


@register_model
def regla_base(pretrained: bool = False, **kwargs) -> ReGLA:
    """The size of metala_base, ReGLA."""
    return build(ReGLA, "regla_base", pretrained, **{**BASE, **kwargs})
