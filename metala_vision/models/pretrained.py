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
    return _fitting(tag, cfg["input_size"][0], cfg["num_classes"])


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


def _fitting(tag: str, in_chans: int, num_classes: int) -> Callable:
    """A filter for timm's builder: patches resampled to the model's, everything else in place.

    It raises WeightsError for a tensor that is missing, unknown or of another shape: timm lets any
    be missing as soon as the number of classes differs.

    Args:
        tag, in_chans, num_classes: of the weights.
    """
    first, head = f"{FIRST_CONV}.weight", (f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias")

    def apply(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        # timm adapts the channels, and takes or leaves the head.
        shapes[first] = (shapes[first][0], in_chans, *shapes[first][2:])
        width = int(model.num_features)  # pyright: ignore[reportArgumentType]
        shapes |= {head[0]: (num_classes, width), head[1]: (num_classes,)}
        if first in state and state[first].ndim == 4:
            # In full precision: timm sums channels in the type that it finds.
            state[first] = resample_patch_embed(state[first].float(), list(shapes[first][2:]))
        for key in sorted(shapes.keys() | state.keys()):
            if key not in state:
                raise WeightsError(f"the weights {tag} lack {key} of this model")
            if key not in shapes:
                raise WeightsError(f"the weights {tag} hold {key}, which this model lacks")
            if tuple(state[key].shape) != shapes[key]:
                raise WeightsError(
                    f"the weights {tag} do not fit: {key} is {tuple(state[key].shape)}, not "
                    f"{shapes[key]}"
                )
        return state

    return apply
