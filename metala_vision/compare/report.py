"""The report of a comparison: one HTML file with its pictures inside, every number as text too."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from metala_vision.run_folder import ENVIRONMENT_FILE, METRICS_FILE, read_metrics

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
from .table import COLUMNS, Row, cells, failures, notes, sources_of, write_text

REPORT_FILE = "report.html"
PICTURES = ("compare.png", "curves.png")


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
    comparison: CompareConfig, rows: list[Row], output: Path, title: str,
    scaled: Scaled | None = None,
) -> None:  # fmt: skip
    """compare.png, curves.png and report.html.

    Raises:
        UserError: where they cannot be written.
    """
    curves = []
    for member in comparison.members:
        for seed in comparison.seeds:
            run_dir = output / f"{member.name}-{seed}"
            if (run_dir / METRICS_FILE).is_file():
                curves.append(curve_of(member.name, seed, read_metrics(run_dir)))
    draw_panels(rows, output / PICTURES[0])
    draw_curves(curves, rows, output / PICTURES[1])
    write_text(
        output / REPORT_FILE, as_html(comparison, rows, curves, _facts(output), title, scaled)
    )


def as_html(
    comparison: CompareConfig, rows: list[Row], curves: list[Curve], facts: dict[str, str],
    title: str, scaled: Scaled | None = None,
) -> str:  # fmt: skip
    """The whole page; nothing in it is fetched from elsewhere."""
    environment = Environment(
        loader=PackageLoader("metala_vision.compare", "."), autoescape=select_autoescape(),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    first = member_config(comparison, comparison.members[0], comparison.seeds[0])
    recipe = first.model_dump(mode="json", exclude={"model": {"model", "model_kwargs"}})
    changed = {m.name: m.settings for m in comparison.members if m.settings}
    sources = sources_of(rows)
    return environment.get_template("report.html").render(
        title=title, columns=COLUMNS, rows=[cells(row, sources) for row in rows],
        failures=failures(rows), notes=notes(rows), sources=sources,
        pictures=[_picture(panel, rows) for panel in known(rows)],
        curves=_address(curves_svg(curves, rows)) if any(c.loss for c in curves) else None,
        scaled=scaled, scaled_picture=_address(scaled.svg) if scaled else None,
        runs=curves, facts=facts, seeds=comparison.seeds, recipe=yaml.safe_dump(recipe),
        differs=comparison.differs, changed=yaml.safe_dump(changed) if changed else "",
    )  # fmt: skip


def _picture(panel: Panel, rows: list[Row]) -> Picture:
    values = [
        f"{row.name} {'unknown' if v is None else format(v, panel.form)}"
        for row, v in ((row, panel.value(row)) for row in rows)
    ]
    return Picture(panel.title, _address(panel_svg(panel, rows)), "; ".join(values))


def _address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _facts(output: Path) -> dict[str, str]:
    """Where the runs were made, each fact once for all that agree."""
    found: dict[str, list[str]] = {}
    for path in sorted(output.glob(f"*/{ENVIRONMENT_FILE}")):
        for name, value in _described(json.loads(path.read_text(encoding="utf-8"))).items():
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
