"""Training that begins from weights: which, and which part of the model is trained.

LoRA (arXiv 2106.09685) is peft's: W + alpha / rank * B A, of which A and B are trained.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from .checkpoint import CONFIG_FILE, MODEL_FILE
from .config import ModelConfig
from .errors import UserError, one_line

# Of a checkpoint's description, what holds for a model that begins from it too.
INHERITED = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
# Arguments of the model that weights do not depend on, or that timm adapts them to.
FREE_ARGUMENTS = {"num_classes", "in_chans", "global_pool", "img_size", "patch_size", "drop_rate",
                  "drop_path_rate", "proj_drop_rate", "pretrained"}  # fmt: skip
ADAPTER = "default"  # peft's name of the only one
OURS = "kernels"  # a folder at the root of a checkout, and a package of the Hub


def begins_from(config: ModelConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration with what the weights decide, and the arguments that load them.

    A folder decides the model's name, sizes and arguments as far as they are not given.

    Returns:
        The configuration, and arguments of timm.create_model; none where it begins from nothing.
    Raises:
        UserError: for a path that holds no weights, or those of another model.
    """
    path = config.pretrained_path
    if path is None:
        return config, {"pretrained": True} if config.pretrained else {}
    described: dict[str, Any] = {}
    if path.is_dir():
        described = _description(path)
        path = path / MODEL_FILE
    if not path.is_file():
        raise UserError(f"model.pretrained_path={config.pretrained_path}: there is no {path}")
    named = described.get("architecture")
    if named and "model" not in config.model_fields_set:
        config = config.model_copy(update={"model": named})
    if named and named != config.model.partition(".")[0]:
        raise UserError(
            f"model.pretrained_path={config.pretrained_path} holds {named}, not {config.model}"
        )
    given, cfg = described.get("model_args", {}), described.get("pretrained_cfg", {})
    own = {key: value for key, value in given.items() if key not in FREE_ARGUMENTS}
    sizes = {"patch_size": given.get("patch_size"), "img_size": cfg.get("input_size")}
    sides = {k: x[-1] if isinstance(x, list) else x for k, x in sizes.items()}
    config = config.model_copy(update={
        "model_kwargs": {**own, **config.model_kwargs},
        **{key: side for key, side in sides.items() if getattr(config, key) is None},
    })  # fmt: skip
    overlay = {key: cfg[key] for key in INHERITED if key in cfg}
    overlay = {k: tuple(x) if isinstance(x, list) else x for k, x in overlay.items()}
    if described.get("label_names"):
        overlay["label_names"] = described["label_names"]
    overlay |= {"file": str(path), "tag": None, **_sizes(path, config, overlay)}
    return config, {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _description(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint's folder."""
    try:
        described = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(described, dict) or "architecture" not in described:
            raise ValueError("it names no architecture")
        return described
    except FileNotFoundError as error:
        runs = " and ".join(str(folder / name) for name in ("last", "best")
                            if (folder / name / CONFIG_FILE).is_file())  # fmt: skip
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:4]) or "nothing"
        what = f"its checkpoints are {runs}" if runs else f"it holds {held}, but no {CONFIG_FILE}"
        raise UserError(f"model.pretrained_path={folder} is no checkpoint: {what}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / CONFIG_FILE}: {one_line(error)}") from error


def _sizes(path: Path, config: ModelConfig, overlay: dict[str, Any]) -> dict[str, Any]:
    """Classes and channels of the weights, in the words of a pretrained_cfg."""
    cfg = timm.get_pretrained_cfg(config.model)
    if cfg is None:
        return {}  # an unknown model, which is told where it is built
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.pretrained_path: {path} cannot be read as safetensors: {one_line(error)}"
        ) from error

    def first(name: Any) -> tuple[int, ...]:
        name = name if isinstance(name, str) else (name or ("",))[0]
        return shapes.get(f"{name}.weight", ())

    head, conv = first(cfg.classifier), first(cfg.first_conv)
    found: dict[str, Any] = {"num_classes": head[0] if head else 0}
    if len(conv) == 4:
        size = overlay.get("input_size") or cfg.input_size
        found["input_size"] = (conv[1], *size[1:])
    return found


def fit_head(model: nn.Module, classes: list[str], num_classes: int) -> str:
    """A new classifier, unless the weights' own is of these classes, or of as many that it does not
    name; the weights and what became of it, in words."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    known = cfg.get("label_names")
    fits = cfg.get("num_classes") == num_classes  # else timm has made a new one
    kept = fits and (known is None or list(known) == classes)
    if fits and not kept:
        reset: Any = model.reset_classifier
        reset(num_classes)
    if not kept:
        for key in ("label_names", "label_descriptions"):
            cfg.pop(key, None)
    tag, file = cfg.pop("tag", None), cfg.get("file")  # it will be neither
    name = f"its weights {tag}" if tag else str(file) if file else "its weights"
    return f"{name}, {'their' if kept else 'a new'} classifier"


def layers_of(model: nn.Module) -> dict[str, int]:
    """The layer of every parameter, counted from the stem, 0, as layer_decay counts; that of the
    classifier is the last.

    Raises:
        UserError: for a model that does not say.
    """
    if not hasattr(model, "group_matcher"):
        raise UserError(
            f"model.freeze_layers: {type(model).__name__} does not say which parameters belong to "
            "which layer"
        )
    matcher: Any = model.group_matcher
    found: Any = group_with_matcher(model.named_parameters(), matcher(coarse=False), reverse=True)
    return {name: int(layer) for name, layer in found.items()}


def choose_trained(model: nn.Module, config: ModelConfig) -> None:
    """Take their gradients from the parameters that are not trained, and add those of LoRA.

    Raises:
        UserError: for more layers than there are, a pattern that names no linear layer, no peft.
    """
    classifier: Any = getattr(model, "get_classifier", lambda: None)()
    if config.freeze_layers:
        layers = layers_of(model)
        last = max(layers.values())
        if config.freeze_layers > last:
            raise UserError(
                f"model.freeze_layers={config.freeze_layers}: {config.model} has {last} layers "
                "before the classifier's"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(layers[name] >= config.freeze_layers)
    if config.linear_probe or config.lora_rank:
        if not isinstance(classifier, nn.Module) or not any(True for _ in classifier.parameters()):
            raise UserError(f"{config.model} has no classifier that could be trained alone")
        if config.lora_rank:
            add_lora(model, config, classifier)
        else:
            model.requires_grad_(False)
        classifier.requires_grad_(True)


def add_lora(model: nn.Module, config: ModelConfig, classifier: nn.Module) -> None:
    """Give linear layers an adapter, in place; nothing but adapters keeps its gradient."""
    inside = {id(module) for module in classifier.modules()}
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    ]  # fmt: skip
    target = config.lora_target
    try:
        chosen = [name for name in linear if target is None or re.fullmatch(target, name)]
    except re.error as error:
        raise UserError(f"model.lora_target={target!r} is no pattern: {error}") from error
    if not chosen:
        some = ", ".join(linear[:3])
        raise UserError(f"model.lora_target={target!r} names no linear layer; there is {some}, ...")
    try:
        with hidden_kernels():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            f"model.lora_rank needs peft, pip install 'metala-vision[lora]': {one_line(error)}"
        ) from error
    rank = config.lora_rank or 1
    settings = LoraConfig(r=rank, lora_alpha=lora_scale(config) * rank, target_modules=chosen)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(settings, model, ADAPTER)


@contextmanager
def hidden_kernels() -> Iterator[None]:
    """Inside, there is no package `kernels`: peft imports transformers, which would take our folder
    for it."""
    there = OURS in sys.modules
    if not there:
        sys.modules[OURS] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if not there:
            del sys.modules[OURS]


def lora_scale(config: ModelConfig) -> float:
    """alpha / rank, of B A."""
    rank = config.lora_rank or 1
    return (config.lora_alpha or rank) / rank


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state_dict with adapters as that of the model without: W + scale B A, in float32.

    Args:
        state: of a model behind add_lora, in any type. scale: lora_scale.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        owner, base, leaf = key.rpartition(".base_layer.")
        if base:
            if leaf == "weight":
                a, b = (state[f"{owner}.lora_{x}.{ADAPTER}.weight"].float() for x in "AB")
                value = (value.float() + scale * (b @ a)).to(value.dtype)
            result[f"{owner}.{leaf}"] = value
        elif ".lora_" not in key:
            result[key] = value
    return result


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The largest modules that have parameters, none of them trained: they stay in evaluation
    mode, without dropout, drop path and moving statistics."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        trained = [parameter.requires_grad for parameter in module.parameters()]
        if trained and not any(trained):
            found.append(module)
            return
        for child in module.children():
            walk(child)

    walk(model)
    return found
