"""Training that begins from weights: which, and which part of the model is trained.

LoRA (arXiv 2106.09685) is peft's: W + alpha / rank * B A, of which A and B are trained.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from .checkpoint import CONFIG_FILE, MODEL_FILE, Checkpoints
from .config import LOADING, ModelConfig
from .config_file import load_config
from .errors import UserError, one_line

# Of a checkpoint's description, what holds for a model that begins from it too.
INHERITED = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
# Arguments that weights do not depend on, that timm adapts them to, or that are no model's.
FREE_ARGUMENTS = {"num_classes", "in_chans", "img_size", "patch_size", "drop_rate",
                  "drop_path_rate", "proj_drop_rate", *LOADING}  # fmt: skip
LONGEST = 300  # characters of another library's complaint
ADAPTER = "default"  # peft's name of the only one
OURS = "kernels"  # a folder at the root of a checkout, and a package of the Hub


class _Cfg(BaseModel):
    """What is used of a pretrained_cfg."""

    model_config = ConfigDict(extra="ignore", strict=True)
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    license: str | None = None

    def inherited(self) -> dict[str, Any]:
        """Of INHERITED what is told."""
        return {key: getattr(self, key) for key in INHERITED if getattr(self, key)}


class _Description(BaseModel):
    """What is used of a checkpoint's config.json."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())
    architecture: str
    label_names: list[str] | dict[str, str] | None = None
    model_args: dict[str, Any] = {}
    pretrained_cfg: _Cfg = _Cfg()


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
    described = _Description(architecture="")
    if path.is_dir():
        described = _description(path)
        path = path / MODEL_FILE
    if not path.is_file():
        raise UserError(f"model.pretrained_path={config.pretrained_path}: there is no {path}")
    named = described.architecture
    if named and "model" not in config.model_fields_set:
        config = config.model_copy(update={"model": named})
    if named and named != config.model.partition(".")[0]:
        raise UserError(
            f"model.pretrained_path={config.pretrained_path} holds {named}, not {config.model}"
        )
    given, cfg = described.model_args, described.pretrained_cfg
    own = {key: value for key, value in given.items() if key not in FREE_ARGUMENTS}
    sizes = {"patch_size": given.get("patch_size"), "img_size": cfg.input_size}
    sides = {k: x[-1] if isinstance(x, list | tuple) else x for k, x in sizes.items()}
    config = config.model_copy(update={
        "model_kwargs": {**own, **config.model_kwargs},
        **{key: side for key, side in sides.items() if getattr(config, key) is None},
    })  # fmt: skip
    overlay = cfg.inherited()
    if isinstance(described.label_names, list):
        overlay["label_names"] = described.label_names
    overlay |= {"file": str(path), "tag": None, **_sizes(path, config, overlay)}
    return config, {"pretrained": True, "pretrained_cfg_overlay": overlay}


def goes_on_from(
    config: ModelConfig, run_dir: Path | None
) -> tuple[ModelConfig, dict[str, Any]] | None:
    """What begins_from gives, for a resumed run, without the weights that it began from, which need
    not be there any more; None where it began from none, or has no checkpoint yet.

    What those weights decided stands in the run's configuration, what is done to an image beside
    its checkpoints.
    """
    if run_dir is None or not (config.pretrained or config.pretrained_path):
        return None
    checkpoints = Checkpoints(run_dir)
    for step in reversed(checkpoints.steps()):
        with suppress(UserError):  # a damaged one, which is passed over
            cfg = _description(checkpoints.path(step)).pretrained_cfg
            if config.pretrained_path is not None:
                config = _decided_before(config, load_config(str(run_dir / "config.yaml")).model)
            return config, {"pretrained_cfg_overlay": cfg.inherited()}
    return None


def _decided_before(config: ModelConfig, stored: ModelConfig) -> ModelConfig:
    """With what begins_from had found for the run where it is not given."""
    found = {
        key: getattr(stored, key)
        for key in ("model", "patch_size", "img_size")
        if key not in config.model_fields_set
    }
    kwargs = {**stored.model_kwargs, **config.model_kwargs}
    return config.model_copy(update={**found, "model_kwargs": kwargs})


def _description(folder: Path) -> _Description:
    """The config.json of a checkpoint's folder."""
    try:
        return _Description.model_validate_json((folder / CONFIG_FILE).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it:"
        raise UserError(f"cannot read {folder / CONFIG_FILE}: {where} {first['msg']}") from error
    except FileNotFoundError as error:
        runs = " and ".join(str(folder / name) for name in ("last", "best")
                            if (folder / name / CONFIG_FILE).is_file())  # fmt: skip
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:4]) or "nothing"
        what = f"its checkpoints are {runs}" if runs else f"it holds {held}, but no {CONFIG_FILE}"
        raise UserError(f"model.pretrained_path={folder} is no checkpoint: {what}") from error
    except OSError as error:
        raise UserError(f"cannot read {folder / CONFIG_FILE}: {one_line(error)}") from error


def _sizes(path: Path, config: ModelConfig, overlay: dict[str, Any]) -> dict[str, Any]:
    """Classes and channels of the weights, in the words of a pretrained_cfg."""
    cfg = timm.get_pretrained_cfg(config.model)
    if cfg is None:
        return {}  # an unknown model, which is told where it is built
    shapes = _shapes(path)

    def first(name: Any) -> tuple[int, ...]:
        name = name if isinstance(name, str) else (name or ("",))[0]
        return shapes.get(f"{name}.weight", ())

    head, conv = first(cfg.classifier), first(cfg.first_conv)
    found: dict[str, Any] = {"num_classes": head[0] if head else 0}
    if len(conv) == 4:
        size = overlay.get("input_size") or cfg.input_size
        found["input_size"] = (conv[1], *size[1:])
    return found


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.pretrained_path: {path} cannot be read as safetensors: {one_line(error)}"
        ) from error


def check_whole(model: nn.Module, config: ModelConfig, weights: dict[str, Any]) -> None:
    """Refuse a file that is of another model in part: where the number of classes differs timm
    leaves out what it does not find. Only the classifier may be another.

    Args:
        weights: arguments of begins_from.
    Raises:
        UserError: naming the first tensor that one of both lacks.
    """
    file = weights.get("pretrained_cfg_overlay", {}).get("file")
    if file is None:
        return
    named: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    own = {key for key in model.state_dict() if not key.startswith(heads)}
    held = {key for key in _shapes(Path(file)) if not key.startswith(heads)}
    for key in sorted(own ^ held):
        has, lacks = ("it", config.model) if key in held else (config.model, "it")
        raise UserError(
            f"model.pretrained_path={config.pretrained_path} is of another model: {has} has {key}, "
            f"{lacks} has not"
        )


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
    for key in ("label_names", "label_descriptions"):
        cfg.pop(key, None)  # a checkpoint says those of its data
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
            heads = "several classifiers" if isinstance(classifier, tuple) else "no classifier"
            raise UserError(f"{config.model} has {heads}; one that can be trained alone is needed")
        if config.lora_rank:
            add_lora(model, config, classifier)
            check_adapters(model, config)
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
    if not linear:
        raise UserError(f"model.lora_rank: {config.model} has no linear layer but its classifier")
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
    rank, layers = config.lora_rank or 1, dict(model.named_modules())
    name, most = min(
        ((n, min(layers[n].in_features, layers[n].out_features)) for n in chosen),  # pyright: ignore
        key=lambda pair: int(pair[1]),  # pyright: ignore
    )
    if rank > most:
        raise UserError(f"model.lora_rank={rank}: {name} is of rank {most} at most")
    settings = LoraConfig(r=rank, lora_alpha=lora_scale(config) * rank, target_modules=chosen)  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(settings, model, ADAPTER)


@torch.no_grad()
def check_adapters(model: nn.Module, config: ModelConfig) -> None:
    """Refuse LoRA where the model reads a layer's weight instead of calling it: the adapter would
    do nothing."""
    called: set[str] = set()
    wrapped = {
        n.removesuffix(".lora_A"): m for n, m in model.named_modules() if n.endswith(".lora_A")
    }
    hooks = [
        module[ADAPTER].register_forward_hook(lambda *_, name=name: called.add(name))  # pyright: ignore
        for name, module in wrapped.items()
    ]
    cfg: Any = getattr(model, "pretrained_cfg", {})
    side = config.img_size or (cfg.get("input_size") or (3, 224, 224))[-1]
    training = model.training
    try:
        model.eval()(torch.zeros(1, config.in_chans, side, side))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    unused = sorted(wrapped.keys() - called)
    if unused:
        raise UserError(
            f"model.lora_rank: {config.model} reads the weight of {unused[0]} without calling that "
            f"layer ({len(unused)} of {len(wrapped)}): LoRA has no effect there; choose others by "
            "model.lora_target"
        )


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
