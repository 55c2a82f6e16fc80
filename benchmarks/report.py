"""The README's tables of measured results, and their pictures, from the files of the runs.

    python benchmarks/report.py [--check]      (make report)

Reads benchmarks/results/*.json and writes what stands in README.md between `<!-- report: NAME -->`
and `<!-- /report -->`, and pictures into docs/. A second time it changes nothing. What no file has
says "not run"; what is of a GPU is taken from files of a GPU alone. --check writes nothing and
fails where the README is not what the files say. --print shows tables of files in another folder.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pictures
from gpu_timing import ROOT
from results import NOT_RUN, OK, command, find, read
from subjects import (
    BATCHES,
    COMPARATORS,
    DEIT,
    FORMS,
    INFERENCE,
    OURS,
    SHAPES,
    SMALL,
    TRAINING,
)

from metala_vision.errors import UserError
from metala_vision.files import write_text

WITHOUT = "Not run."  # instead of a table of that
SIZES = tuple(BATCHES)
PICTURES = {
    "operators": (
        pictures.operators,
        "operators_gpu.png",
        "Time per token of the operators on a GPU",
    ),
    "models": (pictures.models, "models_gpu.png", "Images a second and memory by image size"),
    "step": (pictures.step, "step_gpu.png", "A training step of metala_tiny by part"),
}


class Goal(NamedTuple):
    """What is to be reached: `above` to `below` >= `bound`, or <= it where it is a `ceiling`.

    Both are rows of results, of which `key` is compared.
    """

    text: str
    above: dict
    below: dict
    key: str
    bound: float
    ceiling: bool = False

    @property
    def figure(self) -> float | None:
        return ratio(self.above.get(self.key), self.below.get(self.key))

    @property
    def cells(self) -> tuple[str, str, str]:
        sign = "<=" if self.ceiling else ">="
        text = f"{self.text} {sign} {self.bound}"
        if self.figure is None:
            why = (_why_not(row) for row in (self.above, self.below))
            return text, next((w for w in why if w != NOT_RUN), NOT_RUN), NOT_RUN
        good = self.figure <= self.bound if self.ceiling else self.figure >= self.bound
        return text, f"{self.figure:.2f}", "yes" if good else "no"


def _why_not(row: dict) -> str:
    """Of a row without figures, in a word or three."""
    status = row.get("status", NOT_RUN)
    return NOT_RUN if status == OK else status.partition(":")[0]


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def goals(operators: dict, models: dict) -> list[Goal]:
    """The goals for the kernels and for metala_tiny beside DeiT, each from one run."""

    def operator(form: str, N: int, B: int, H: int) -> dict:
        keys = {"form": form, "N": N, "B": B, "H": H, "backward": True}
        row = find(operators.get("rows", []), **keys)
        return {**row, "token_ms": row["ms"] / (N * B)} if row.get("ms") else row

    def trained(name: str, size: int) -> dict:
        keys = {"model": name, "size": size, "compiled": True, "what": TRAINING}
        row = find(models.get("rows", []), **keys)
        # The goal is that of one batch on both sides.
        halved = row.get("batch", BATCHES[size]) != BATCHES[size]
        return {"status": f"batch {row['batch']}"} if halved else row

    found = []
    for shape in SHAPES[:2]:
        ours, gla = (operator(form, *shape) for form in ("ours", "chunk_gla"))
        name = "B{1} N{0} H{2}".format(*shape)
        found += [
            Goal(f"forward and backward, {name}: speed to chunk_gla twice", gla, ours, "ms", 5.0),
            Goal(f"saved memory of chunk_gla twice to ours, {name}", gla, ours, "saved_mib", 4.0),
            Goal(f"forward and backward, {name}: time to the byte floor", ours,
                 {**ours, "ms": ours.get("floor_ms")}, "ms", 3.5, ceiling=True),
        ]  # fmt: skip
    short, long = (operator("ours", *shape) for shape in SHAPES[1:3])
    found.append(
        Goal("time per token at N 16384 to 4096", long, short, "token_ms", 1.15, ceiling=True)
    )
    for size, bound in ((224, 1.0), (1024, 4.0)):
        text = f"`{OURS}` training step, compiled, {size} px: speed to DeiT with SDPA"
        found.append(Goal(text, trained(OURS, size), trained(DEIT, size), "images_s", bound))
    text = "the same at 224 px: peak memory to DeiT's"
    found.append(Goal(text, trained(OURS, 224), trained(DEIT, 224), "peak_mib", 1.25, ceiling=True))
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def source(result: dict) -> str:
    """On what, with what: below a table."""
    versions = ", ".join(
        f"{name} {version}"
        for name, version in result["versions"].items()
        if name != "python" and version != "missing"
    )
    return f"{result['device']}, {versions}, commit {result['commit']}, one run."


def goals_section(results: dict[str, dict]) -> str:
    made = goals(results.get("operators", {}), results.get("models", {}))
    rows = [list(goal.cells) for goal in made]
    return table(["goal", "figure", "reached"], rows)


def families_section(results: dict[str, dict]) -> str:
    result = results.get("families_cpu", {"rows": []})
    deit = find(result["rows"], model=DEIT)
    head = ["model", "img/s 224", "to DeiT", "MiB", "img/s 512", "to DeiT", "MiB"]
    rows = []
    for row in result["rows"]:
        cells = [f"`{row['model']}`"]
        for size in (224, 512):
            speed = row[f"images_s_{size}"]
            to_deit = ratio(speed, deit.get(f"images_s_{size}"))
            cells += [f"{speed:.1f}", NOT_RUN if to_deit is None else f"{to_deit:.2f}"]
            cells += [f"{row[f'mib_{size}']:.0f}"]
        rows.append(cells)
    return table(head, rows) + (f"\n\n{source(result)}" if rows else f"\n\n{NOT_RUN}")


def _value(row: dict, key: str, digits: int) -> str:
    return _why_not(row) if row.get(key) is None else f"{row[key]:.{digits}f}"


def models_section(results: dict[str, dict]) -> str:
    """Images a second, in brackets to DeiT of the same size in the same way; memory of training."""
    if "models" not in results:
        return WITHOUT
    result = results["models"]
    measured = list(dict.fromkeys(row["model"] for row in result["rows"]))
    names = [name for name in (DEIT, OURS, *SMALL, *COMPARATORS) if name in measured]
    names += [name for name in measured if name not in names]
    parts = []
    for compiled in (True, False):
        rows = []
        for name in names:
            mine = {
                (r["what"], r["size"]): r
                for r in result["rows"]
                if r["model"] == name and r["compiled"] == compiled
            }
            if compiled or any(r["status"] == OK for r in mine.values()):
                deit = SMALL[1] if name in SMALL else DEIT
                rows.append([f"`{name}`", *_model_cells(mine, result["rows"], deit, compiled)])
        head = ["compiled" if compiled else "eager"]
        head += [f"train {size}" for size in SIZES] + [f"infer {size}" for size in SIZES]
        if rows:
            parts.append(table([*head, "MiB 224", "MiB 1024"], rows))
    parts += [source(result), f"![{PICTURES['models'][2]}](docs/{PICTURES['models'][1]})"]
    if "step" in results:
        parts.append(f"![{PICTURES['step'][2]}](docs/{PICTURES['step'][1]})")
    return "\n\n".join(parts)


def _model_cells(mine: dict, rows: list[dict], deit: str, compiled: bool) -> list[str]:
    cells = []
    for what in (TRAINING, INFERENCE):
        for size in SIZES:
            row = mine.get((what, size), {})
            beside = find(rows, model=deit, size=size, compiled=compiled, what=what)
            to_deit = ratio(row.get("images_s"), beside.get("images_s"))
            cell = _value(row, "images_s", 0)
            cells.append(cell if to_deit is None else f"{cell} ({to_deit:.2f})")
    for size in (224, 1024):
        row = mine.get((TRAINING, size), {})
        batch = f" (batch {row['batch']})" if row.get("peak_mib") else ""
        cells.append(_value(row, "peak_mib", 0) + batch)
    return cells


def operators_section(results: dict[str, dict]) -> str:
    """Forward and backward, in brackets the kernels alone."""
    if "operators" not in results:
        return WITHOUT
    result = results["operators"]
    head = ["B, N", "ours ms (kernels)", "chunk_gla twice ms", "SDPA ms", "portable ms",
            "floor ms", "saved MiB", "saved, chunk_gla"]  # fmt: skip
    rows = []
    for N, B, H in SHAPES:
        shape = {"N": N, "B": B, "H": H, "backward": True}
        mine = {form: find(result["rows"], form=form, **shape) for form in FORMS}
        times = []
        for row in mine.values():
            alone = f" ({row['gpu_ms']:.3f})" if row.get("gpu_ms") else ""
            times.append(_value(row, "ms", 3) + alone)
        floor = next((row["floor_ms"] for row in mine.values() if row), None)
        rows.append(
            [f"{B}, {N}", *times, NOT_RUN if floor is None else f"{floor:.4f}"]
            + [_value(mine[form], "saved_mib", 1) for form in ("ours", "chunk_gla")]
        )
    picture = f"![{PICTURES['operators'][2]}](docs/{PICTURES['operators'][1]})"
    return "\n\n".join([table(head, rows), source(result), picture])


SECTIONS: dict[str, Callable[[dict[str, dict]], str]] = {
    "families_cpu": families_section,
    "goals": goals_section,
    "operators": operators_section,
    "models": models_section,
}


def load(folder: Path, any_device: bool = False) -> dict[str, dict]:
    """{name: result} of a folder; without those that should be of a GPU and are not."""
    results = {}
    for name in ("families_cpu", *PICTURES):
        path = folder / f"{name}.json"
        if path.exists():
            result = read(path)
            if any_device or name == "families_cpu" or result.get("gpu"):
                results[name] = result
    return results


def filled(text: str, results: dict[str, dict]) -> str:
    """The README with its sections made anew.

    Raises:
        UserError: for a section that is not there once, or that nobody makes.
    """
    names = re.findall(r"^<!-- report: (\S+) -->$", text, re.M)
    if sorted(names) != sorted(SECTIONS):
        raise UserError(f"the README has the sections {names}, expected {list(SECTIONS)} once each")

    def section(match: re.Match) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]](results)}\n{match[3]}"

    whole = r"^(<!-- report: (\S+) -->)$.*?^(<!-- /report -->)$"
    made, count = re.subn(whole, section, text, flags=re.M | re.S)
    if count != len(SECTIONS):
        raise UserError("a section of the README has no <!-- /report -->")
    return made


def draw(results: dict[str, dict], docs: Path) -> list[Path]:
    """The pictures of these results."""
    drawn = []
    docs.mkdir(parents=True, exist_ok=True)
    for name, (plot, file, _) in PICTURES.items():
        if name in results and any(r.get("status", OK) == OK for r in results[name]["rows"]):
            plot(results[name], docs / file)
            drawn.append(docs / file)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the pictures' folder")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--check", action="store_true", help="write nothing")
    ways.add_argument("--print", action="store_true", help="only print, whatever the device")
    arguments = parser.parse_args()
    results = load(arguments.results, any_device=arguments.print)
    if arguments.print:
        for name, make in SECTIONS.items():
            if name != "families_cpu":
                print(make(results) + "\n")
        draw(results, arguments.docs)
        return
    try:
        text = arguments.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {arguments.readme}: {error.strerror}") from error
    made = filled(text, results)
    if arguments.check:
        absent = [PICTURES[n][1] for n in PICTURES if n in results
                  and not (arguments.docs / PICTURES[n][1]).exists()]  # fmt: skip
        if made != text or absent:
            what = "its tables" if made != text else f"docs/{absent[0]}"
            sys.exit(f"{arguments.readme.name}: {what} are not what the results say; make report")
        return
    if made != text:
        write_text(arguments.readme, made)
    for path in draw(results, arguments.docs):
        print(path)


if __name__ == "__main__":
    command(main)
