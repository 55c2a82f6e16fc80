"""The table of a comparison: as Markdown for people, as CSV with every number."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from metala_vision.files import write_text

from .estimates import Estimate
from .published import Published

TABLE_FILES = ("compare.md", "compare.csv")


@dataclass
class Row:
    """A member of the table; what is not known is None."""

    name: str
    model: str
    parameters: int | None = None
    gflops: float | None = None
    """Of one image's forward pass; a multiplication and an addition are two."""
    top1: Estimate | None = None
    """Percent of the held-out images, after the last step."""
    top5: Estimate | None = None
    train_img_s: float | None = None
    """Images a second of training steps."""
    inference_img_s: float | None = None
    memory_mib: float | None = None
    """The most that training took."""
    steps: int | None = None
    minutes: float | None = None
    """That a run took, evaluations included; mean over seeds."""
    place: int | None = None
    published: Published | None = None
    errors: list[str] = field(default_factory=list)


COLUMNS = {
    "model": "left", "top-1 %": "right", "top-5 %": "right", "place": "right",
    "parameters": "right", "GFLOPs": "right", "train img/s": "right", "inference img/s": "right",
    "MiB": "right", "steps": "right", "minutes": "right", "published %": "right",
}  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: Estimate | None, seeds: int) -> str:
    if value is None:
        return "-"
    return str(value) if value.count == seeds else f"{value}, {value.count} of {seeds} seeds"


def cells(row: Row, rows: list[Row]) -> list[str]:
    """A row of the table as text; what is not known is a dash."""
    sources = sources_of(rows)
    seeds = max((r.top1.count for r in rows if r.top1 is not None), default=0)
    published = "-"
    if row.published is not None:
        published = f"{row.published.top1} [{sources.index(row.published.source) + 1}]"
    return [
        row.name, _percent(row.top1, seeds), _percent(row.top5, seeds), _number(row.place, ""),
        _number(row.parameters, ","), _number(row.gflops, ".3g"), _number(row.train_img_s, ".1f"),
        _number(row.inference_img_s, ".1f"), _number(row.memory_mib, ".0f"),
        _number(row.steps, ","), _number(row.minutes, ".1f"), published,
    ]  # fmt: skip


def sources_of(rows: list[Row]) -> list[str]:
    """Of the published figures, each once, in the order of the rows."""
    return list(dict.fromkeys(row.published.source for row in rows if row.published is not None))


def notes(rows: list[Row]) -> list[str]:
    """How to read the table."""
    told = [
        "top-1, top-5: of the held-out images after the last step, mean over seeds ± half the 95 % "
        "interval (n/a with one seed); a place only where no other interval is met.",
        "GFLOPs: one image's forward pass, a multiplication and an addition counted as two (papers "
        "often print half), without norms and activations. img/s and MiB: of one process; minutes: "
        "of a run with its evaluations, whatever else the machine did.",
    ]
    if sources_of(rows):
        told.append(
            "published %: ImageNet-1k top-1 of a model of that name, 300 epochs at 224 px by its "
            "paper's own recipe: not comparable with the other columns."
        )
    return told


def failures(rows: list[Row]) -> list[str]:
    """A line for each."""
    return [f"{row.name} failed: {error}" for row in rows for error in row.errors]


def as_markdown(rows: list[Row]) -> str:
    """The table, and below it what failed, how to read it, and sources."""
    sources = sources_of(rows)
    rules = ("---:" if side == "right" else "---" for side in COLUMNS.values())
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(cells(row, rows))} |" for row in rows]
    for block in (failures(rows), notes(rows), [f"[{i}] {s}" for i, s in enumerate(sources, 1)]):
        for line in block:
            lines += ["", line]
    return "\n".join(lines) + "\n"


def as_csv(rows: list[Row]) -> str:
    """Every number at full precision; an empty cell is not known."""
    table = io.StringIO()
    writer = csv.writer(table)
    names = (
        "parameters", "gflops", "train_img_s", "inference_img_s", "memory_mib", "steps", "minutes",
        "place",
    )  # fmt: skip
    parts = ("mean", "half_width", "count")
    heads = [f"{key}_{part}" for key in ("top1", "top5") for part in parts]
    published = ("published_top1", "published_source")
    writer.writerow(["name", "model", *names, *heads, *published, "errors"])
    for row in rows:
        estimates = [
            getattr(getattr(row, k), part, None) for k in ("top1", "top5") for part in parts
        ]
        numbers = [getattr(row, name) for name in names]
        printed = row.published or ("", "")
        writer.writerow(
            [row.name, row.model, *numbers, *estimates, *printed, "; ".join(row.errors)]
        )
    return table.getvalue()


def write_tables(rows: list[Row], output: Path) -> None:
    """compare.md and compare.csv."""
    for name, text in zip(TABLE_FILES, (as_markdown(rows), as_csv(rows)), strict=True):
        write_text(output / name, text)
