"""Which mixers are instances of the unified form, and the instance that one is."""

from typing import Any

from torch import Tensor, nn

from . import unified_channels as channels
from . import unified_functions as functions
from .attention import AttentionMixer
from .eva_attention import EVAAttentionMixer
from .gla import GLAMixer
from .hgrn import HGRNMixer
from .hgrn2 import HGRN2Mixer
from .linear_attention import LinearAttentionMixer
from .lru import LRUMixer
from .mamba import MambaMixer
from .metala import MetaLAMixer
from .mixer import TokenMixer
from .regla import ReGLAMixer
from .retnet import RetNetMixer
from .unified import Functions, UnifiedMixer

INSTANCES: dict[type[TokenMixer], type[functions.Instance]] = {
    MetaLAMixer: functions.MetaLA,
    GLAMixer: functions.GLA,
    HGRNMixer: channels.HGRN,
    HGRN2Mixer: functions.HGRN2,
    ReGLAMixer: functions.ReGLA,
    RetNetMixer: functions.RetNet,
    LinearAttentionMixer: functions.LinearAttention,
    LRUMixer: channels.LRU,
    MambaMixer: channels.Mamba,
}
# Mixers whose decays have a least value, which the backbone learns for each layer.
BOUNDED: tuple[type[TokenMixer], ...] = (HGRNMixer, HGRN2Mixer)
# A softmax weighs tokens by all the others: no state of a fixed size gives it.
NO_RECURRENCE: tuple[type[TokenMixer], ...] = (AttentionMixer, EVAAttentionMixer)


def unified(
    mixer: nn.Module, lower_bound: Tensor | None = None, impl: str = "auto"
) -> UnifiedMixer:
    """The mixer as an instance of the unified form: the same map from the same parameters.

    Args:
        mixer: one of INSTANCES, whose parameters it shares.
        lower_bound: the least decay [C] of this layer, of HGRN and HGRN2 alone: of block i
            model.lower_bounds()[i], as it is then; a block of theirs takes no instance.
        impl: see UnifiedMixer.
    Raises:
        ValueError: naming the mixer, if it is none of them; for a bound that is missing, or that
            the mixer does not have.
    """
    m: Any = mixer
    instance_cls = INSTANCES.get(type(m))
    if instance_cls is None:
        none = isinstance(mixer, NO_RECURRENCE)
        why = "is no gated recurrence" if none else "has no unified form"
        accepted = ", ".join(cls.__name__ for cls in INSTANCES)
        raise ValueError(f"{type(mixer).__name__} {why}; accepted: {accepted}")
    if isinstance(mixer, BOUNDED) and lower_bound is None:
        raise ValueError(
            f"{type(mixer).__name__} needs lower_bound, the least decay [C] of its layer: of block "
            f"i model.lower_bounds()[i]"
        )
    if lower_bound is not None and not isinstance(mixer, BOUNDED):
        raise ValueError(f"{type(mixer).__name__} has no lower_bound")
    own = instance_cls(mixer, lower_bound)
    options: dict[str, Any] = {"num_heads": m.num_heads, **own.options()}
    if "conv" not in options:
        options["conv"] = m.conv
    five = Functions(own.query, own.key, own.value, own.decay, own.gate)
    made = UnifiedMixer(
        five, m.out_proj.out_features, direction=m.direction, scans=m.scans, out=m.out_proj,
        impl=impl, **options,
    )  # fmt: skip
    made.source = mixer  # its other parameters
    return made
