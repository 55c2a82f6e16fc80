"""The keys of a configuration as flags of the command line."""

import argparse
from collections.abc import Iterable
from typing import Any

import yaml

from .config import SECTIONS
from .errors import UserError, one_line


def add_flags(group: Any, section: str, keys: Iterable[str]) -> list[str]:
    """A flag for each of these keys of a section; the flags."""
    flags = []
    for key in keys:
        field = SECTIONS[section].model_fields[key]
        flags.append(f"--{key.replace('_', '-')}")
        text = str(field.annotation)
        many = "tuple[" in text or "dict[" in text
        default = "" if field.default is None or field.default == {} else f" [{field.default}]"
        group.add_argument(
            flags[-1],
            dest=f"{section}.{key}",
            metavar="KEY=VALUE" if key.endswith("_kwargs") else "VALUE",
            nargs="+" if many else "?" if field.annotation is bool else None,
            const="true" if field.annotation is bool else None,
            default=argparse.SUPPRESS,
            help=f"{field.description}{default}".replace("%", "%%"),
        )
    return flags


def overrides_of(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What those flags say: {section: {key: value}}."""
    overrides: dict[str, dict[str, Any]] = {}
    for dest, text in vars(given).items():
        section, dot, key = dest.partition(".")
        if dot:
            overrides.setdefault(section, {})[key] = value_of(key, text)
    return overrides


def value_of(key: str, text: str | list[str]) -> Any:
    """What was typed: as it stands, for the schema to convert; "null" is None.

    The values of --model-kwargs and its like have no schema and are read as YAML.
    """
    if key.endswith("_kwargs"):
        flag = f"--{key.replace('_', '-')}"
        pairs = [item.partition("=") for item in text]
        for name, equals, _ in pairs:
            if not equals:
                raise UserError(f"{flag} takes key=value, got {name!r}")
        try:
            return {name: yaml.safe_load(value) for name, _, value in pairs}
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{flag}: {one_line(error)}") from error
    return None if text in ("null", ["null"]) else text
