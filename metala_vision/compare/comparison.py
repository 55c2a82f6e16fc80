"""What is compared: the file, the configuration of each run, and that they match."""

from typing import Any

import torch
import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator
from torch import nn

from metala_vision.build import create_model
from metala_vision.config import SECTIONS, Config, Section
from metala_vision.config_file import find_config, load_config, shipped_comparisons
from metala_vision.config_values import Seed
from metala_vision.data import preprocessing_of
from metala_vision.errors import UserError, nearest, one_line

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a folder too
TRAITS = ("conv", "direction", "scans")
# What is the model's own where it is not configured, by the key that configures it.
PREPROCESSING = {
    "input_size": "model.img_size", "mean": "data.mean", "std": "data.std",
    "crop_pct": "data.crop_pct",
}  # fmt: skip
# Keys that are no matter of settings, and what they are a matter of.
DECIDED = {
    "model.model": "the member's model", "run.seed": "seeds", "run.run_dir": "the output folder",
    "run.output": "the output folder", "run.resume": "the comparison, which goes on by itself",
}  # fmt: skip


class Member(Section):
    """One backbone of a comparison."""

    name: str = Field(pattern=NAME, max_length=80)
    model: str
    """Any model registered with timm."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe that it changes, as section.key; each must be named under `differs`. An
    argument of the model is model.model_kwargs.NAME; several are a mapping of model.model_kwargs,
    laid over that of all members."""


class CompareConfig(Section):
    """A comparison: what is trained, how, and how often."""

    recipe: str
    """A configuration that ships, or a file."""
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Keys of the recipe that all members change: {section: {key: value}}."""
    members: list[Member] = Field(min_length=1)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    differs: list[str] = Field(default_factory=list)
    """What members may differ in besides the model: section.key, model.model_kwargs.NAME (without
    NAME: any), or conv, direction, scans of their mixers."""
    sizes: list[PositiveInt] = Field(default_factory=list)
    """Sides in px at which each model is timed too, as `metala-vision scaling` does."""

    @field_validator("members", mode="before")
    @classmethod
    def _names_alone(cls, members: Any) -> Any:
        if not isinstance(members, list):
            return members
        return [{"name": m, "model": m} if isinstance(m, str) else m for m in members]

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:  # the same run again is no other sample
            raise ValueError(f"seed {twice} is there twice")
        return seeds


def load_comparison(name: str) -> CompareConfig:
    """A comparison from a file, or one that ships ("compare/quickstart").

    Raises:
        UserError: for an unknown key, an unfit value, names that are not different.
    """
    path = find_config(name, shipped_comparisons)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not {"recipe", "members"} <= set(values):
            raise UserError(f"{path} is no comparison: it needs recipe and members")
        config = CompareConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    names = [member.name for member in config.members]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two members are called {twice!r}")
    return config


def _explain(error: ValidationError) -> str:
    """pydantic's first complaint as one line; of an unknown key, which are accepted."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        schema = Member if len(first["loc"]) > 1 else CompareConfig
        accepted = list(schema.model_fields)
        close = nearest(where.rpartition(".")[2], accepted)
        return f"unknown key {where!r}{close or '; accepted: ' + ', '.join(accepted)}"
    value = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
    return one_line(f"{where}{value} does not fit: {first['msg'].removeprefix('Value error, ')}")


def member_config(comparison: CompareConfig, member: Member, seed: int) -> Config:
    """The configuration of one run.

    Raises:
        UserError: for a setting that is none, or that the comparison itself decides.
    """
    values = {section: dict(keys) for section, keys in comparison.overrides.items()}
    given = [f"{section}.{key}" for section, keys in comparison.overrides.items() for key in keys]
    for key in [*given, *member.settings]:
        if key in DECIDED:
            raise UserError(f"member {member.name}: {key} is decided by {DECIDED[key]}")
    for key, value in {
        **member.settings, "model.model": member.model, "run.seed": seed,
    }.items():  # fmt: skip
        section, dot, name = key.partition(".")
        name, more, argument = name.partition(".")
        if not dot or section not in SECTIONS or (more and name != "model_kwargs"):
            raise UserError(f"member {member.name}: {key!r} is no section.key of a configuration")
        keys = values.setdefault(section, {})
        if name != "model_kwargs" or not (more or isinstance(value, dict)):
            keys[name] = value
        else:
            keys[name] = {**keys.get(name, {}), **({argument: value} if more else value)}
    return load_config(comparison.recipe, values)


def _keys(config: Config) -> dict[str, Any]:
    """Every key with its value, each argument of the model as one."""
    keys = {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in values.items()
    }
    arguments = keys.pop("model.model_kwargs")
    return keys | {f"model.model_kwargs.{name}": value for name, value in arguments.items()}


def traits(model: nn.Module) -> dict[str, Any]:
    """What must be alike in the mixers of a matched comparison; nothing for a model of timm's."""
    found: dict[str, Any] = {}
    for block in getattr(model, "blocks", ()):
        mixer: Any = getattr(block, "mixer", None)
        if mixer is None:
            return {}
        for name in ("direction", "scans"):
            if hasattr(mixer, name):
                found.setdefault(name, []).append(getattr(mixer, name))
        convs = [m for m in mixer.modules() if type(m).__name__ == "TokenConv"]
        found.setdefault("conv", []).append(type(convs[0].conv).__name__ if convs else "none")
    return {name: tuple(map(str, values)) for name, values in found.items()}


def check_matched(comparison: CompareConfig, num_classes: int = 10) -> None:
    """Refuse a comparison whose members differ in more than it says: in their configurations, in
    what is done to an image where that is the model's own matter, or in their mixers.

    Raises:
        UserError: naming the first difference and both members.
    """
    known = {f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys.model_fields}
    known |= {*TRAITS, "interpolation", "crop_mode"}
    for name in comparison.differs:
        if name not in known and not name.startswith("model.model_kwargs."):
            raise UserError(f"differs: unknown {name!r}{nearest(name, sorted(known))}")
    free = {"model.model", *comparison.differs}
    first: tuple[str, dict[str, Any]] | None = None
    first_traits: dict[str, tuple[str, Any]] = {}
    for member in comparison.members:
        config = member_config(comparison, member, comparison.seeds[0])
        if config.run.patience is not None:
            raise UserError(
                f"member {member.name}: run.patience={config.run.patience} would end runs at "
                "different steps; give overrides: {run: {patience: null}}"
            )
        with torch.device("meta"):
            model = create_model(config.model, config.model.num_classes or num_classes)
        keys = _keys(config) | {
            PREPROCESSING.get(name, name): value
            for name, value in preprocessing_of(config.data, config.model, model).items()
        }
        first = first or (member.name, keys)
        for key in sorted(keys.keys() | first[1].keys()):
            value, other = (known.get(key, "the model's own") for known in (keys, first[1]))
            wide = "model.model_kwargs" if key.startswith("model.model_kwargs.") else key
            if value != other and not {key, wide} & free:
                raise UserError(
                    f"{member.name} and {first[0]} differ in {key}: {value!r} and {other!r}; "
                    "name it under `differs`, or make them equal"
                )
        for trait, value in traits(model).items():
            name, before = first_traits.setdefault(trait, (member.name, value))
            difference = _difference(value, before)
            if trait not in free and difference:
                raise UserError(
                    f"{member.name} and {name} differ in {trait}: {difference}; name it under "
                    "`differs`, or make them equal"
                )


def _difference(value: tuple[str, ...], before: tuple[str, ...]) -> str:
    """Of the first layer that is not alike; of two depths, the layers that both have."""
    for layer, (own, other) in enumerate(zip(value, before, strict=False)):
        if own != other:
            return f"{own} and {other} in layer {layer}"
    return ""
