"""What the outputs of a classifier are called."""

import contextlib
from collections.abc import Iterable
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


def describe(names: Iterable[str]) -> dict[str, str]:
    """Words for those that are WordNet's ids, as ImageNet's classes are: {name: words}."""
    info, found = ImageNetInfo(), {}
    for name in names:
        with contextlib.suppress(KeyError):
            found[name] = info.label_name_to_description(name)
    return found


def labels_of(model: nn.Module, checkpoint: str) -> tuple[list[str], dict[str, str]]:
    """The names of a model's outputs, and words for those that have some.

    Names are those of its configuration; else, of timm's own models that have as many outputs as
    an ImageNet has classes, that one's, as timm takes them; else numbers.

    Args:
        checkpoint: as it was named, a folder or a timm name.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    count = int(getattr(model, "num_classes", 0))
    names: list[str] = list(cfg.get("label_names") or ())
    if not names and timm.is_model(checkpoint):
        subset = infer_imagenet_subset(model)
        names = ImageNetInfo(subset).label_names() if subset else []
    if len(names) > count:
        return [str(i) for i in range(count)], {}
    described = {**describe(names), **(cfg.get("label_descriptions") or {})}
    # model.num_classes may be more than the classes of the data.
    return names + [str(i) for i in range(len(names), count)], described


def brief(words: str, longest: int) -> str:
    """The first of several words for one thing, as long as a picture has room for."""
    first = words.split(",")[0]
    return first if len(first) <= longest else f"{first[: longest - 1]}…"
