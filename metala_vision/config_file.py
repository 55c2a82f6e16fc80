"""Configurations from files: those that ship, a user's own, and flags laid over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .config import SECTIONS, Config
from .errors import UserError, nearest, one_line

# The files that ship with the package, also as configs/ at the root of a checkout.
CONFIG_FOLDER = Path(__file__).parent / "configs"
OTHER_FOLDERS = ("ablations", "accelerate", "compare")  # in it, whose files configure no run


def shipped_configs() -> list[str]:
    """Names of the configurations that ship with the package, such as "quickstart"."""
    files = (f for f in CONFIG_FOLDER.rglob("*.yaml") if f.parent.name not in OTHER_FOLDERS)
    return sorted(f.relative_to(CONFIG_FOLDER).with_suffix("").as_posix() for f in files)


def shipped_comparisons() -> list[str]:
    """Names of the comparisons that ship with the package, such as "compare/quickstart"."""
    files = (f for folder in ("ablations", "compare") for f in (CONFIG_FOLDER / folder).iterdir())
    return sorted(f"{f.parent.name}/{f.stem}" for f in files if f.suffix == ".yaml")


def find_config(name: str, shipped_names: Callable[[], list[str]] = shipped_configs) -> Path:
    """The file of that path, or the shipped one of that name.

    Args:
        shipped_names: of the kind that is looked for, for the error.
    Raises:
        UserError: where there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = CONFIG_FOLDER / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    raise UserError(
        f"no configuration {name!r}: neither a file nor one that ships; "
        f"shipped: {', '.join(shipped_names())}"
    )


def load_config(
    name: str | None = None, overrides: dict[str, dict[str, Any]] | None = None
) -> Config:
    """Read a YAML file (None: the defaults), lay `overrides` over it and check the result.

    Args:
        name: a path, or the name of a configuration that ships.
        overrides: {section: {key: value}}.
    Raises:
        UserError: for a file that is no YAML mapping, an unknown key or an unfit value.
    """
    values: dict[str, Any] = {}
    path = None
    if name is not None:
        path = find_config(name)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}") from error
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise UserError(
                f"{path} must be a mapping of {', '.join(SECTIONS)}, got {values!r:.80}"
            )
        values = {key: {} if value is None else value for key, value in values.items()}
    overrides = overrides or {}
    for section, keys in overrides.items():
        given = values.setdefault(section, {})
        if isinstance(given, dict):
            given.update(keys)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        section, *rest = error.errors()[0]["loc"] or ("",)
        typed = path is None or (rest and rest[0] in overrides.get(str(section), {}))
        source = "" if typed else f"{path}: "
        raise UserError(f"{source}{one_line(explain(error))}") from error


def explain(error: ValidationError) -> str:
    """The first complaint of pydantic as one line, with the nearest key where one is unknown."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        value = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
        return f"{where}{value} does not fit: {first['msg'].removeprefix('Value error, ')}"
    key = str(first["loc"][-1])
    if len(first["loc"]) == 1:
        homes = {k: s for s, section in SECTIONS.items() for k in section.model_fields}
        if key in homes:
            return f"unknown section {key!r}; it is a key of {homes[key]!r}: {homes[key]}.{key}"
        return f"unknown section {key!r}{nearest(key, list(SECTIONS))}"
    section = str(first["loc"][0])
    homes = [s for s, other in SECTIONS.items() if key in other.model_fields]
    if homes:
        return f"unknown key {where!r}; did you mean {homes[0]}.{key}?"
    every = [k for other in SECTIONS.values() for k in other.model_fields]
    in_section = nearest(key, list(SECTIONS[section].model_fields))
    return f"unknown key {where!r}{in_section or nearest(key, every)}"
