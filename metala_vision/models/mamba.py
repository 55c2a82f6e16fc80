"""Mamba backbones.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752,
with the two directions of Vision Mamba, https://arxiv.org/abs/2401.09417. Written from the
equations.
"""

from functools import partial

from timm.models import register_model

from metala_vision.layers import MambaMixer, check_mamba
from metala_vision.layers.mixer import check_sizes

from .backbone import Backbone
from .family import BASE, NANO, SMALL, TINY, build, four_sizes, generate_default_cfgs


class Mamba(Backbone):
    """The shared backbone with Mamba's S6 as its token mixer.

    Args:
        num_heads: groups of channels for several scans (split_heads); nothing else.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: "forward", "backward" or "bidirectional".
        expand, d_state, dt_rank, shared_parameters, average: see MambaMixer.
        mlp_ratio: None gives the channel mixer what the token mixer leaves of 13 C^2 parameters a
            block. Published blocks have none, and twice as many layers: mlp_ratio=0, depth=24.
        embed_dim: C.
        **kwargs: those of Backbone; an unknown one raises TypeError.
    """

    def __init__(
        self,
        num_heads: int = 3,
        conv: str = "depthwise2d",
        direction: str = "bidirectional",
        expand: int = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        shared_parameters: bool = False,
        average: bool = True,
        mlp_ratio: float | None = None,
        embed_dim: int = 192,
        **kwargs,
    ) -> None:
        check_mamba(expand, d_state, dt_rank)
        mixer = partial(
            MambaMixer,
            num_heads=num_heads,
            conv=conv,
            direction=direction,
            expand=expand,
            d_state=d_state,
            dt_rank=dt_rank,
            shared_parameters=shared_parameters,
            average=average,
        )
        if mlp_ratio is None:
            check_sizes(embed_dim=embed_dim)
            rank = embed_dim / 16 if dt_rank is None else dt_rank
            ways = 1 if shared_parameters or direction != "bidirectional" else 2
            projections = 3 + ways * (2 * rank + 3 * d_state) / embed_dim
            mlp_ratio = (13 - expand * projections) / 3
            if mlp_ratio <= 0:
                raise ValueError(
                    f"expand={expand}, d_state={d_state} and dt_rank={dt_rank} leave the channel "
                    "mixer nothing of 13 embed_dim^2 parameters a block: give mlp_ratio"
                )
        super().__init__(mixer, mlp_ratio=mlp_ratio, embed_dim=embed_dim, **kwargs)


default_cfgs = generate_default_cfgs(
    four_sizes(
        "mamba",
        "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        "arXiv:2312.00752",
    )
)


@register_model
def mamba_nano(pretrained: bool = False, **kwargs) -> Mamba:
    """For 64-pixel images in patches of 8; the size of metala_nano, Mamba."""
    return build(Mamba, "mamba_nano", pretrained, **{**NANO, **kwargs})


@register_model
def mamba_tiny(pretrained: bool = False, **kwargs) -> Mamba:
    """The size of metala_tiny, Mamba."""
    return build(Mamba, "mamba_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def mamba_small(pretrained: bool = False, **kwargs) -> Mamba:
    """The size of metala_small, Mamba."""
    return build(Mamba, "mamba_small", pretrained, **{**SMALL, **kwargs})


@register_model
def mamba_base(pretrained: bool = False, **kwargs) -> Mamba:
    """The size of metala_base, Mamba."""
    return build(Mamba, "mamba_base", pretrained, **{**BASE, **kwargs})
