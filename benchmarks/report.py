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
from models import COMPARATORS, DEIT, INFERENCE, OURS, SMALL, TRAINING
from results import OK, command, one, read

from metala_vision.errors import UserError
from metala_vision.files import write_text

NOT_RUN = "not run"
WITHOUT = "Not run."  # instead of a table of that
SIZES = (224, 512, 1024, 2048)
SHAPES = ((196, 128), (4096, 8), (16384, 2), (1024, 32), (64, 256))  # tokens and batch
PICTURES = {
    "kernels": (pictures.kernels, "kernels_gpu.png", "Time per token of the operators on a GPU"),
    "models": (pictures.models, "models_gpu.png", "Images a second and memory by image size"),
    "step": (pictures.step, "step_gpu.png", "A training step of metala_tiny by part"),
}


class Goal(NamedTuple):
    """What is to be reached: `figure` >= `bound`, or <= it where it is a `ceiling`."""

    text: str
    figure: float | None
    bound: float
    ceiling: bool = False

    @property
    def cells(self) -> tuple[str, str, str]:
        sign = "<=" if self.ceiling else ">="
        text = f"{self.text} {sign} {self.bound}"
        if self.figure is None:
            return text, NOT_RUN, NOT_RUN
        good = self.figure <= self.bound if self.ceiling else self.figure >= self.bound
        return text, f"{self.figure:.2f}", "yes" if good else "no"


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def goals(kernels: dict, models: dict) -> list[Goal]:
    """The goals for the kernels and for metala_tiny beside DeiT, each from one run."""

    def row(form: str, N: int, B: int) -> dict:
        return one(kernels.get("rows", []), form=form, N=N, B=B, H=3, backward=True)

    def of(form: str, N: int, B: int, key: str) -> float | None:
        return row(form, N, B).get(key)

    def trained(name: str, size: int, key: str) -> float | None:
        found = one(models.get("rows", []), model=name, size=size, compiled=True, what=TRAINING)
        # The goal is that of one batch, 256 images, on both sides.
        return found.get(key) if size != 224 or found.get("batch") == 256 else None

    found = []
    for N, B in SHAPES[:2]:
        shape = f"B{B} N{N} H3"
        speed = ratio(of("chunk_gla", N, B, "ms"), of("ours", N, B, "ms"))
        found.append(Goal(f"forward and backward, {shape}: speed to chunk_gla twice", speed, 5.0))
    for N, B in SHAPES[:2]:
        memory = ratio(of("chunk_gla", N, B, "saved_mib"), of("ours", N, B, "saved_mib"))
        shape = f"B{B} N{N} H3"
        found.append(Goal(f"saved memory of chunk_gla twice to ours, {shape}", memory, 4.0))
    for N, B in SHAPES[:2]:
        ours = row("ours", N, B)
        floor = ratio(ours.get("ms"), ours.get("floor_ms"))
        text = f"forward and backward, B{B} N{N} H3: time to the byte floor"
        found.append(Goal(text, floor, 3.5, ceiling=True))
    each = {N: ratio(of("ours", N, B, "ms"), N * B) for N, B in SHAPES[1:3]}
    growth = ratio(each[16384], each[4096])
    found.append(Goal("time per token at N 16384 to 4096", growth, 1.15, ceiling=True))
    for size, bound in ((224, 1.0), (1024, 4.0)):
        speed = ratio(trained(OURS, size, "images_s"), trained(DEIT, size, "images_s"))
        text = f"`{OURS}` training step, compiled, {size} px: speed to DeiT with SDPA"
        found.append(Goal(text, speed, bound))
    memory = ratio(trained(OURS, 224, "peak_mib"), trained(DEIT, 224, "peak_mib"))
    found.append(Goal("the same at 224 px: peak memory to DeiT's", memory, 1.25, ceiling=True))
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
    rows = [list(g.cells) for g in goals(results.get("kernels", {}), results.get("models", {}))]
    return table(["goal", "figure", "reached"], rows)


def families_section(results: dict[str, dict]) -> str:
    result = results.get("families_cpu", {"rows": []})
    deit = one(result["rows"], model=DEIT)
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
    if row.get("status", NOT_RUN if not row else OK) != OK:
        return row.get("status", NOT_RUN).partition(":")[0]
    return f"{row[key]:.{digits}f}" if row.get(key) is not None else NOT_RUN


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
            beside = one(rows, model=deit, size=size, compiled=compiled, what=what)
            to_deit = ratio(row.get("images_s"), beside.get("images_s"))
            cell = _value(row, "images_s", 0)
            good = to_deit is not None and row["status"] == OK
            cells.append(f"{cell} ({to_deit:.2f})" if good else cell)
    for size in (224, 1024):
        row = mine.get((TRAINING, size), {})
        batch = f" (batch {row['batch']})" if row.get("peak_mib") else ""
        cells.append(_value(row, "peak_mib", 0) + batch)
    return cells


def kernels_section(results: dict[str, dict]) -> str:
    if "kernels" not in results:
        return WITHOUT
    result = results["kernels"]
    head = ["B, N", "ours ms", "chunk_gla twice ms", "SDPA ms", "portable ms", "floor ms",
            "saved MiB", "saved, chunk_gla"]  # fmt: skip
    rows = []
    for N, B in SHAPES:
        mine = {r["form"]: r for r in result["rows"] if (r["N"], r["B"]) == (N, B)
                and r["backward"]}  # fmt: skip
        times = (mine.get(form, {}) for form in ("ours", "chunk_gla", "sdpa", "chunked"))
        floor = next(iter(mine.values()), {}).get("floor_ms")
        rows.append(
            [f"{B}, {N}", *(_value(row, "ms", 3) for row in times)]
            + [NOT_RUN if floor is None else f"{floor:.4f}"]
            + [_value(mine.get(form, {}), "saved_mib", 1) for form in ("ours", "chunk_gla")]
        )
    picture = f"![{PICTURES['kernels'][2]}](docs/{PICTURES['kernels'][1]})"
    return "\n\n".join([table(head, rows), source(result), picture])


SECTIONS: dict[str, Callable[[dict[str, dict]], str]] = {
    "families_cpu": families_section,
    "goals": goals_section,
    "kernels": kernels_section,
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
