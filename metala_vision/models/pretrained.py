"""Pretrained weights for timm's builder: which a name asks for, and whether they fit the model.

`metala_vision.weights` is imported where weights are asked for: a model without needs none of it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from timm.layers import resample_patch_embed
from timm.models import PretrainedCfg
from torch import Tensor, nn

from metala_vision.errors import WeightsError

SOURCES = ("state_dict", "file", "hf_hub_id", "url")  # of a user's own weights, in timm's words
FIRST_CONV, CLASSIFIER = "patch_embed.proj", "head.fc"  # of every model of ours
PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "weights"


def with_weights(cfgs: dict[str, Any]) -> dict[str, Any]:
    """The configurations of the models, those with weights in the package under their tags: timm's
    default is the first of them."""
    found: dict[str, Any] = {}
    tagged = _shipped()
    for name, cfg in cfgs.items():
        own = {tag: entry for tag, entry in tagged.items() if tag.partition(".")[0] == name}
        if not own:
            found[name] = cfg
        for tag, entry in own.items():
            inputs = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in entry["preprocessing"].items()
            }
            found[tag] = {
                **cfg, **inputs, "num_classes": entry["num_classes"],
                "license": entry["license"], "file": str(SHIPPED / entry["file"]),
            }  # fmt: skip
    return found


def _shipped() -> dict[str, Any]:
    """Of the package's manifest, those whose file is there; its faults are told when it is used."""
    try:
        manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
        return {k: x for k, x in manifest["weights"].items() if (SHIPPED / x["file"]).is_file()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def as_untrained(kwargs: dict[str, Any]) -> None:
    """Take what is of the weights out of the description of a model that does not begin from them.

    Args:
        kwargs: of timm's builder, changed in place.
    """
    if kwargs.get("pretrained_cfg") is None:
        plain = {"tag": None, "file": None, "license": "apache-2.0"}
        kwargs["pretrained_cfg_overlay"] = {**plain, **(kwargs.get("pretrained_cfg_overlay") or {})}


def use_weights(variant: str, kwargs: dict[str, Any]) -> Callable | None:
    """Turn the weights that the user asked for into a checked file, in the arguments.

    Args:
        kwargs: of timm's builder; pretrained_cfg and pretrained_cfg_overlay are replaced.
    Returns:
        The filter that fits them to the model; None where timm is to load the user's own.
    Raises:
        WeightsError: where there are none, or they are not what they should be.
    """
    given, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay") or {}
    strict = kwargs.get("pretrained_strict", True)
    own = next((key for key in SOURCES if overlay.get(key)), None)
    if own is not None:
        # timm would rather take the file of the default tag than an address of the user's.
        others = {key: None for key in SOURCES if key != own and key not in overlay}
        kwargs["pretrained_cfg_overlay"] = {"tag": None, **others, **overlay}
        if own != "file" or "num_classes" not in overlay:
            return None
        channels, *_ = overlay.get("input_size", (3,))
        return _fitting(str(overlay["file"]), channels, overlay["num_classes"], strict)
    if isinstance(given, PretrainedCfg):
        given = asdict(given)
    if isinstance(given, dict):
        if Path(given.get("file") or "").parent.parent != SHIPPED:
            return None
        given = given.get("tag")  # one of ours, from timm.get_pretrained_cfg
    from metala_vision import weights

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
    return _fitting(tag, cfg["input_size"][0], cfg["num_classes"], strict)


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
    from metala_vision.weights import tags_of

    tags = [f"{name}.{tag}" for tag in tags_of(name, cache_dir)]
    if len(tags) > 1:
        raise WeightsError(f"{name} has several weights; name one: {', '.join(tags)}")
    if not tags:
        raise missing(name)
    return tags[0]


def missing(tag: str) -> WeightsError:
    """For a name without weights: where they were looked for, and how to get some."""
    from metala_vision.weights import shipped, source

    variant = tag.partition(".")[0]
    looked = ["this package", *(filter(None, [source.configured_base()]))]
    namespace = source.configured_namespace()
    if namespace:
        looked.append(f"{namespace}/{tag if '.' in tag else f'{tag}.TAG'} on the Hub")
    config = f"imagenet1k/{variant}"
    has_config = (PACKAGE / "configs" / f"{config}.yaml").is_file()
    how = f"--config {config}" if has_config else f"--model {variant}"
    others = [f"{variant}.{own}" for own in shipped().tags(variant)]
    there = f"; there is {', '.join(others)}" if others else ""
    return WeightsError(
        f"no weights for {tag} in {', '.join(looked)}{there}; {source.WEIGHTS_VARIABLE} (a folder "
        f"or http(s) address) and {source.HUB_VARIABLE} (a namespace of the Hub, `hf auth login` "
        f"for private ones) name more, and `python train_imagenet.py {how} --data-dir DIR` trains "
        "some"
    )


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """The weights of a checkpoint under our names: unwrapped, without the prefixes of wrappers, the
    patches resampled to the model's (FlexiViT, arXiv 2212.08013)."""
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    cleaned = {}
    for name, value in state_dict.items():
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        cleaned[name] = value
    first = f"{FIRST_CONV}.weight"
    if first in cleaned and cleaned[first].ndim == 4:
        size: list[int] = list(model.state_dict()[first].shape[2:])
        # In full precision: timm sums channels in the type that it finds.
        cleaned[first] = resample_patch_embed(cleaned[first].float(), size)
    return cleaned


def _fitting(tag: str, in_chans: int, num_classes: int, strict: bool) -> Callable:
    """checkpoint_filter_fn, and WeightsError for a tensor that is missing, unknown or of another
    shape: timm lets any be missing as soon as the number of classes differs.

    Args:
        tag, in_chans, num_classes: of the weights; 0 classes are no head.
        strict: False accepts missing and unknown ones.
    """
    first, head = f"{FIRST_CONV}.weight", (f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias")

    def apply(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        state = checkpoint_filter_fn(state, model)
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        # timm adapts the channels, and takes or leaves the head.
        shapes[first] = (shapes[first][0], in_chans, *shapes[first][2:])
        width = int(model.num_features)  # pyright: ignore[reportArgumentType]
        for key in head:
            shapes.pop(key, None)
        if num_classes:
            shapes |= {head[0]: (num_classes, width), head[1]: (num_classes,)}
        for key in sorted(shapes.keys() | state.keys()):
            if key not in state and strict:
                raise WeightsError(f"the weights {tag} lack {key} of this model")
            if key not in shapes and strict:
                raise WeightsError(f"the weights {tag} hold {key}, which this model lacks")
            if key in state and key in shapes and tuple(state[key].shape) != shapes[key]:
                raise WeightsError(
                    f"the weights {tag} do not fit: {key} is {tuple(state[key].shape)}, not "
                    f"{shapes[key]}"
                )
        return state

    return apply
