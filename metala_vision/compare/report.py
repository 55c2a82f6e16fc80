"""The report of a comparison: one HTML file with its pictures inside, every number as text too."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from metala_vision.files import write_text
from metala_vision.run_folder import ENVIRONMENT_FILE, read_metrics

from .comparison import CompareConfig, member_config
from .pictures import (
    Curve,
    Panel,
    curve_of,
    curves_svg,
    draw_curves,
    draw_panels,
    known,
    panel_svg,
)
from .table import COLUMNS, Row, cells, failures, notes, sources_of

REPORT_FILE = "report.html"
PICTURES = ("compare.png", "curves.png")
# Read when a comparison begins: it may run for days, and the file be another one by then.
TEMPLATE = Environment(
    loader=PackageLoader("metala_vision.compare", "."), autoescape=select_autoescape(),
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
).get_template("report.html")  # fmt: skip


@dataclass
class Picture:
    """An image of the report. `data` is its address, `text` what it shows, for those who cannot."""

    title: str
    data: str
    text: str


@dataclass
class Scaled:
    """How models grow with resolution: the table of `metala-vision scaling`, and its picture."""

    text: str
    svg: str


def write_report(
    comparison: CompareConfig, rows: list[Row], output: Path, title: str, seconds: float = 0.0,
    scaled: Scaled | None = None,
) -> None:  # fmt: skip
    """compare.png, curves.png and report.html.

    Args:
        seconds: that each part of a speed was measured.

    Raises:
        UserError: where they cannot be written.
    """
    curves = []
    runs = {
        (member.name, seed): output / f"{member.name}-{seed}"
        for member in comparison.members for seed in comparison.seeds
    }  # fmt: skip
    for (name, seed), run_dir in runs.items():
        lines = metrics_of(run_dir)
        if lines:
            curves.append(curve_of(name, seed, lines))
    draw_panels(rows, output / PICTURES[0])
    draw_curves(curves, rows, output / PICTURES[1])
    facts = _facts(list(runs.values()))
    if seconds:
        facts["speeds"] = f"{seconds:g} s for each part, batch and precision of the recipe"
    write_text(output / REPORT_FILE, as_html(comparison, rows, curves, facts, title, scaled))


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of its metrics.jsonl; none where that is missing or torn."""
    try:
        return read_metrics(run_dir)
    except (OSError, ValueError):
        return []


def as_html(
    comparison: CompareConfig, rows: list[Row], curves: list[Curve], facts: dict[str, str],
    title: str, scaled: Scaled | None = None,
) -> str:  # fmt: skip
    """The whole page; nothing in it is fetched from elsewhere."""
    first = member_config(comparison, comparison.members[0], comparison.seeds[0])
    recipe = first.model_dump(mode="json", exclude={"model": {"model", "model_kwargs"}})
    changed = {m.name: m.settings for m in comparison.members if m.settings}
    models = {
        m.name: member_config(comparison, m, comparison.seeds[0]).model.model_dump(
            mode="json", include={"model", "model_kwargs"}
        )
        for m in comparison.members
    }
    sources = sources_of(rows)
    return TEMPLATE.render(
        title=title, columns=COLUMNS, rows=[cells(row, rows) for row in rows],
        failures=failures(rows), notes=notes(rows), sources=sources,
        pictures=[_picture(panel, rows) for panel in known(rows)],
        curves=_address(curves_svg(curves, rows)) if any(c.loss for c in curves) else None,
        scaled=scaled, scaled_picture=_address(scaled.svg) if scaled else None,
        runs=curves, facts=facts, seeds=comparison.seeds, recipe=yaml.safe_dump(recipe),
        differs=comparison.differs, changed=yaml.safe_dump(changed) if changed else "",
        models=yaml.safe_dump(models, sort_keys=False, default_flow_style=None),
    )  # fmt: skip


def _picture(panel: Panel, rows: list[Row]) -> Picture:
    values = [
        f"{row.name} {'unknown' if v is None else format(v, panel.form)}"
        for row, v in ((row, panel.value(row)) for row in rows)
    ]
    return Picture(panel.title, _address(panel_svg(panel, rows)), "; ".join(values))


def _address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _facts(runs: list[Path]) -> dict[str, str]:
    """Where the runs were made, each fact once for all that agree; torn files tell nothing."""
    found: dict[str, list[str]] = {}
    for run in runs:
        try:
            told = _described(json.loads((run / ENVIRONMENT_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError):
            continue
        for name, value in told.items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    begun = found.pop("begun", [])
    told = {name: "; ".join(values) for name, values in found.items()}
    return {"first run begun": min(begun), **told} if begun else told


def _described(environment: dict[str, Any]) -> dict[str, str]:
    changes = " with changes" if environment["uncommitted_changes"] else ""
    devices = environment["gpus"] or [f"{environment['cpu_cores']} CPU cores"]
    return {
        "begun": environment["started"],
        "commit": f"{environment['commit'] or 'no checkout'}{changes}",
        "machine": f"{', '.join(devices)}, {environment['platform']}",
        "threads": str(environment["torch_threads"]),
        "python": environment["python"],
        "packages": ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v),
    }
