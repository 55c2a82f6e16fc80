"""What every family shares: sizes, timm's configuration of a model, and how one is built."""

from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models import generate_default_cfgs as timm_default_cfgs
from torch import nn

from .pretrained import (
    CLASSIFIER,
    FIRST_CONV,
    as_untrained,
    checkpoint_filter_fn,
    use_weights,
    with_weights,
)

Model = TypeVar("Model", bound=nn.Module)

# 32 channels of key and 64 of value per head where a mixer halves the keys, else 64 of each.
NANO: dict[str, Any] = {
    "img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 8, "num_heads": 2,
}  # fmt: skip
TINY: dict[str, Any] = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12}


def build(model_cls: type[Model], variant: str, pretrained: bool, **kwargs) -> Model:
    """A registered model, by timm's builder; with features_only, from four blocks.

    Raises:
        WeightsError: pretrained, and the weights are nowhere, or not what they should be.
    """
    filter_fn = checkpoint_filter_fn
    if pretrained:
        filter_fn = use_weights(variant, kwargs) or checkpoint_filter_fn
    else:
        as_untrained(kwargs)
    depth = kwargs.get("depth", 12)
    quarters = tuple(sorted({max(1, depth * i // 4) - 1 for i in (1, 2, 3, 4)}))
    return build_model_with_cfg(  # pyright: ignore[reportReturnType]
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={
            "out_indices": quarters,
            "feature_cls": "getter",
            "flatten_sequential": True,
        },
        **kwargs,
    )


def cfg(paper_name: str, paper_ids: str, size: int = 224, patch: int = 16, **kwargs) -> dict:
    """What timm keeps of a model beside its weights."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // patch, size // patch),
        "fixed_input_size": False,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": FIRST_CONV,
        "classifier": CLASSIFIER,
        "license": "apache-2.0",
        "paper_name": paper_name,
        "paper_ids": paper_ids,
        **kwargs,
    }


def generate_default_cfgs(cfgs: dict[str, Any]) -> dict[str, Any]:
    """timm's registry of a family; models that have weights stand in it under their tags."""
    return timm_default_cfgs(with_weights(cfgs))


def four_sizes(name: str, paper_name: str, paper_ids: str) -> dict[str, Any]:
    """The configurations of NAME_nano, _tiny, _small and _base."""
    paper = (paper_name, paper_ids)
    return {
        f"{name}_nano": cfg(*paper, size=64, patch=8, crop_pct=1.0),
        f"{name}_tiny": cfg(*paper),
        f"{name}_small": cfg(*paper),
        f"{name}_base": cfg(*paper),
    }
