"""What is compared: the file, the configuration of each run, and that they match."""

from typing import Any

import torch
import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator
from torch import nn

from metala_vision.build import create_model
from metala_vision.config import SECTIONS, Config, Section, Seed
from metala_vision.config_file import explain, find_config, load_config, shipped_comparisons
from metala_vision.errors import UserError, nearest, one_line

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a folder too
TRAITS = ("conv", "direction", "scans")


class Member(Section):
    """One backbone of a comparison."""

    name: str = Field(pattern=NAME)
    model: str
    """Any model registered with timm."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe that it changes, as section.key; each must be named under `differs`."""


class CompareConfig(Section):
    """A comparison: what is trained, how, and how often."""

    recipe: str
    """A configuration that ships, or a file."""
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Keys of the recipe that all members change: {section: {key: value}}."""
    members: list[Member] = Field(min_length=1)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    differs: list[str] = Field(default_factory=list)
    """What members may differ in besides the model: section.key, or conv, direction, scans."""
    sizes: list[PositiveInt] = Field(default_factory=list)
    """Sides in px at which each model is timed too, as `metala-vision scaling` does."""

    @field_validator("members", mode="before")
    @classmethod
    def _names_alone(cls, members: Any) -> Any:
        if not isinstance(members, list):
            return members
        return [{"name": m, "model": m} if isinstance(m, str) else m for m in members]


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
        raise UserError(f"{path}: {one_line(explain(error))}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    names = [member.name for member in config.members]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two members are called {twice!r}")
    return config


def member_config(comparison: CompareConfig, member: Member, seed: int) -> Config:
    """The configuration of one run."""
    values = {section: dict(keys) for section, keys in comparison.overrides.items()}
    for key, value in {
        **member.settings, "model.model": member.model, "run.seed": seed,
    }.items():  # fmt: skip
        section, dot, name = key.partition(".")
        if not dot or section not in SECTIONS:
            raise UserError(f"member {member.name}: {key!r} is no section.key of a configuration")
        values.setdefault(section, {})[name] = value
    return load_config(comparison.recipe, values)


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
    """Refuse a comparison whose members differ in more than it says.

    Raises:
        UserError: naming the first difference and both members.
    """
    known = {f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys.model_fields}
    known |= set(TRAITS)
    for name in comparison.differs:
        if name not in known:
            raise UserError(f"differs: unknown {name!r}{nearest(name, sorted(known))}")
    free = {"model.model", *comparison.differs}
    first: tuple[str, dict[str, Any]] | None = None
    first_traits: dict[str, tuple[str, Any]] = {}
    for member in comparison.members:
        config = member_config(comparison, member, comparison.seeds[0])
        keys = {
            f"{section}.{key}": value
            for section, values in config.model_dump().items()
            for key, value in values.items()
        }
        first = first or (member.name, keys)
        for key, value in keys.items():
            if key not in free and value != first[1][key]:
                raise UserError(
                    f"{member.name} and {first[0]} differ in {key}: {value!r} and "
                    f"{first[1][key]!r}; name it under `differs`, or make them equal"
                )
        with torch.device("meta"):
            model = create_model(config.model, num_classes)
        for trait, value in traits(model).items():
            name, before = first_traits.setdefault(trait, (member.name, value))
            if trait not in free and value != before:
                raise UserError(
                    f"{member.name} and {name} differ in {trait}: {_difference(value, before)}; "
                    "name it under `differs`, or make them equal"
                )


def _difference(value: tuple[str, ...], before: tuple[str, ...]) -> str:
    """Of the first layer that is not alike."""
    for layer, (own, other) in enumerate(zip(value, before, strict=False)):
        if own != other:
            return f"{own} and {other} in layer {layer}"
    return f"{len(value)} and {len(before)} layers"
