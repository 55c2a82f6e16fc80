"""`metala-vision compare FILE`: several backbones under one recipe, as one table.

Every member and seed is a run of `train` in a process of its own, resumed where it was stopped; one
that fails is a row with its error.
"""

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, ValidationError, field_validator
from torch import nn

from .build import create_model
from .config import SECTIONS, Config, Section, Seed
from .config_file import explain, find_config, load_config
from .errors import UserError, nearest, one_line
from .estimates import Estimate, estimate, places
from .run_folder import RESULT_FILE

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a folder too
TABLE_FILES = ("compare.md", "compare.csv")


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

    @field_validator("members", mode="before")
    @classmethod
    def _names_alone(cls, members: Any) -> Any:
        if not isinstance(members, list):
            return members
        return [{"name": m, "model": m} if isinstance(m, str) else m for m in members]


@dataclass
class Row:
    """A member of the table. top1, top5 in percent; images a second; MiB."""

    name: str
    model: str
    parameters: int | None = None
    top1: Estimate | None = None
    top5: Estimate | None = None
    train_img_s: float | None = None
    inference_img_s: float | None = None
    memory_mib: float | None = None
    place: int | None = None
    errors: list[str] = field(default_factory=list)


def load_comparison(name: str) -> CompareConfig:
    """A comparison from a file, or one that ships ("compare/quickstart").

    Raises:
        UserError: for an unknown key, an unfit value, names that are not different.
    """
    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    known |= {"conv", "direction", "scans"}
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
                    f"{member.name} and {name} differ in {trait}: {value[0]} and {before[0]} in "
                    "their first layer; name it under `differs`, or make them equal"
                )


def compare(comparison: CompareConfig, output: Path, seconds: float = 5.0) -> list[Row]:
    """Train and measure every member; write compare.md and compare.csv into `output`.

    What is finished there is not done again.

    Args:
        seconds: for each part of a speed; 0 measures none.
    Raises:
        UserError: for members that do not match, and a folder that cannot be written.
    """
    check_matched(comparison)
    try:
        (output / "configs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    rows = []
    for member in comparison.members:
        row = Row(member.name, member.model)
        rows.append(row)
        results = []
        for seed in comparison.seeds:
            result = _trained(comparison, member, seed, output, row)
            results += [] if result is None else [result]
        if results:
            row.parameters = results[0]["parameters"]
            row.top1, row.top5 = (estimate([r[k] for r in results]) for k in ("top1", "top5"))
        if seconds and not row.errors:
            _measured(comparison, member, output, seconds, row)
    trained = [row for row in rows if row.top1 is not None]
    for row, place in zip(trained, places([row.top1 for row in trained if row.top1]), strict=True):
        row.place = place
    write_tables(rows, output)
    return rows


def _command(command: str, flags: list[str], log: Path) -> str | None:
    """Run a command of ours; None, or the last line that it told of its failure."""
    told = [sys.executable, "-m", "metala_vision", command, *flags]
    try:
        with log.open("a") as file:
            done = subprocess.run(told, stdout=file, stderr=subprocess.PIPE, text=True)
            file.write(done.stderr)
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}") from error
    if done.returncode == 0:
        return None
    if done.returncode in (130, -2):
        raise KeyboardInterrupt
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _written(comparison: CompareConfig, member: Member, seed: int, output: Path) -> Path:
    config = member_config(comparison, member, seed)
    path = output / "configs" / f"{member.name}-{seed}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return path


def _trained(
    comparison: CompareConfig, member: Member, seed: int, output: Path, row: Row
) -> dict[str, Any] | None:
    run_dir = output / f"{member.name}-{seed}"
    if not (run_dir / RESULT_FILE).is_file():
        print(f"{member.name}, seed {seed}", flush=True)
        config = _written(comparison, member, seed, output)
        flags = ["--config", str(config), "--run-dir", str(run_dir), "--resume", "auto"]
        error = _command("train", flags, output / f"{run_dir.name}.txt")
        if error is not None:
            row.errors.append(f"seed {seed}: {error}")
            return None
    return json.loads((run_dir / RESULT_FILE).read_text())


def _measured(
    comparison: CompareConfig, member: Member, output: Path, seconds: float, row: Row
) -> None:
    path = output / f"{member.name}-speed.json"
    if not path.is_file():
        config = _written(comparison, member, comparison.seeds[0], output)
        flags = ["--config", str(config), "--seconds", str(seconds), "--json", str(path)]
        error = _command("bench", flags, output / f"{member.name}-speed.txt")
        if error is not None:
            row.errors.append(f"speed: {error}")
            return
    speed = json.loads(path.read_text())
    row.train_img_s, row.inference_img_s = speed["step"], speed["evaluation"]
    row.memory_mib = speed["memory_mib"]


COLUMNS = (
    "model", "parameters", "top-1 %", "top-5 %", "place", "train img/s", "inference img/s", "MiB",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as text; what is not known is a dash."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        row.name, number(row.parameters, ","), str(row.top1 or "-"), str(row.top5 or "-"),
        number(row.place, ""), number(row.train_img_s, ".1f"), number(row.inference_img_s, ".1f"),
        number(row.memory_mib, ".0f"),
    ]  # fmt: skip


def as_markdown(rows: list[Row]) -> str:
    """The table, and below it what failed and how to read it."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += [""] + [f"{row.name} failed: {error}" for row in rows for error in row.errors]
    lines.append(
        "Mean over seeds ± half the 95 % interval (n/a with one seed); a place only where no other "
        "interval is met. Held-out images, after the last step."
    )
    return "\n".join(lines) + "\n"


def write_tables(rows: list[Row], output: Path) -> None:
    """compare.md, and compare.csv with the numbers."""
    table = io.StringIO()
    writer = csv.writer(table)
    names = ("parameters", "train_img_s", "inference_img_s", "memory_mib", "place")
    parts = ("mean", "half_width", "count")
    heads = [f"{key}_{part}" for key in ("top1", "top5") for part in parts]
    writer.writerow(["name", "model", *names, *heads, "errors"])
    for row in rows:
        estimates = [
            getattr(getattr(row, k), part, None) for k in ("top1", "top5") for part in parts
        ]
        numbers = [getattr(row, name) for name in names]
        writer.writerow([row.name, row.model, *numbers, *estimates, "; ".join(row.errors)])
    try:
        for name, text in zip(TABLE_FILES, (as_markdown(rows), table.getvalue()), strict=True):
            fresh = output / f"{name}.new"
            fresh.write_text(text, encoding="utf-8", newline="")
            os.replace(fresh, output / name)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
