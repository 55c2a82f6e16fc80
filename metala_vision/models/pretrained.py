"""Pretrained weights for timm's builder: which a name asks for, and whether they fit the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.layers import resample_patch_embed
from timm.models import PretrainedCfg
from torch import Tensor, nn

from metala_vision import weights
from metala_vision.errors import WeightsError
from metala_vision.weights.source import (
    HERE,
    HUB_VARIABLE,
    WEIGHTS_VARIABLE,
    configured_base,
    configured_namespace,
    tags_of,
)

SOURCES = ("state_dict", "file", "hf_hub_id", "url")  # of a user's own weights, in timm's words
FIRST_CONV, CLASSIFIER = "patch_embed.proj", "head.fc"  # of every model of ours
CONFIGS = Path(__file__).parents[1] / "configs"


def with_weights(cfgs: dict[str, Any]) -> dict[str, Any]:
    """The configurations of the models, those with weights under their tags: timm's default is the
    first of them."""
    found: dict[str, Any] = {}
    shipped = weights.shipped()
    for name, cfg in cfgs.items():
        tags = shipped.tags(name)
        if not tags:
            found[name] = cfg
        for tag in tags:
            entry = shipped.weights[f"{name}.{tag}"]
            source: dict[str, Any] = {"file": str(HERE / entry.file)}
            if not (HERE / entry.file).is_file():
                namespace = configured_namespace()
                source = {"hf_hub_id": f"{namespace}/{name}.{tag}"} if namespace else {}
            own = {k: v for k, v in entry.pretrained_cfg().items() if not k.startswith("label_")}
            found[f"{name}.{tag}"] = {**cfg, **own, **source}
    return found


def use_weights(variant: str, kwargs: dict[str, Any]) -> Callable | None:
    """Turn the weights that the user asked for into a checked file, in the arguments.

    Args:
        kwargs: of timm's builder; pretrained_cfg and pretrained_cfg_overlay are replaced.
    Returns:
        The filter that fits them to the model; None where the weights are the user's own.
    Raises:
        WeightsError: where there are none, or they are not what they should be.
    """
    given, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay") or {}
    if isinstance(given, (dict, PretrainedCfg)) or any(overlay.get(key) for key in SOURCES):
        return None
    cache_dir = kwargs.get("cache_dir")
    tag = resolve_tag(f"{variant}.{given}" if given else variant, cache_dir)
    found = weights.locate(tag, cache_dir)
    if found is None:
        raise missing(tag)
    cfg = found.entry.pretrained_cfg()
    if kwargs.get("num_classes") not in (None, found.entry.num_classes):
        cfg |= {"label_names": None, "label_descriptions": None}  # of another head
    cfg |= {"tag": tag.partition(".")[2], "file": str(found.path), "hf_hub_id": None}
    kwargs["pretrained_cfg"] = None
    kwargs["pretrained_cfg_overlay"] = {**cfg, **overlay}
    return _fitting(tag, cfg["input_size"][0])


def resolve_tag(name: str, cache_dir: str | Path | None = None) -> str:
    """MODEL.TAG of MODEL or MODEL.TAG: timm's default where it has weights, else the only one that
    METALA_VISION_WEIGHTS has.

    Raises:
        WeightsError: where there is none, or several.
    """
    if "." in name:
        return name
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.tag and cfg.has_weights:
        return f"{name}.{cfg.tag}"
    tags = [f"{name}.{tag}" for tag in tags_of(name, cache_dir)]
    if len(tags) > 1:
        raise WeightsError(f"{name} has several weights; name one: {', '.join(tags)}")
    if not tags:
        raise missing(name)
    return tags[0]


def missing(tag: str) -> WeightsError:
    """For a name without weights: where they were looked for, and how to get some."""
    variant = tag.partition(".")[0]
    looked = ["this package", *(filter(None, [configured_base()]))]
    namespace = configured_namespace()
    if namespace:
        looked.append(f"{namespace}/{tag if '.' in tag else f'{tag}.TAG'} on the Hub")
    config = f"imagenet1k/{variant}"
    how = f"--config {config}" if (CONFIGS / f"{config}.yaml").is_file() else f"--model {variant}"
    others = [f"{variant}.{own}" for own in weights.shipped().tags(variant)]
    there = f"; there is {', '.join(others)}" if others else ""
    return WeightsError(
        f"no weights for {tag} in {', '.join(looked)}{there}; {WEIGHTS_VARIABLE} (a folder or "
        f"http(s) address) and {HUB_VARIABLE} (a namespace of the Hub) name more, and "
        f"`python train_imagenet.py {how} --data-dir DIR` trains some"
    )


def _fitting(tag: str, in_chans: int) -> Callable:
    """A filter for timm's builder: patches resampled to the model's, everything else in place.

    It raises WeightsError for a tensor that is missing, unknown or of another shape: timm lets any
    be missing as soon as the number of classes differs.

    Args:
        tag: of the weights. in_chans: of the weights.
    """

    def apply(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        own = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        name = f"{FIRST_CONV}.weight"
        if name in state and state[name].ndim == 4:
            size = list(own[name][2:])
            if list(state[name].shape[2:]) != size:
                state[name] = resample_patch_embed(state[name].float(), size)
        heads = (f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias")
        for key in sorted(own.keys() | state.keys()):
            if key in heads and (key not in own or key in state):
                continue  # timm takes or leaves it, by the number of classes
            if key not in state:
                raise WeightsError(f"the weights {tag} lack {key} of this model")
            if key not in own:
                raise WeightsError(f"the weights {tag} hold {key}, which this model lacks")
            shape = tuple(state[key].shape)
            if key == name and shape[:1] == own[key][:1] and shape[1:2] == (in_chans,):
                continue  # timm adapts the channels
            if shape != own[key]:
                raise WeightsError(
                    f"the weights {tag} do not fit: {key} is {shape}, the model's {own[key]}"
                )
        return state

    return apply
