"""The README's tables are what the committed results say, and the goals follow from the figures."""

import json
import sys

import pytest

from metala_vision.errors import UserError
from tests.benchmarks._load import BENCHMARKS, HEADER, ROOT, load

report = load("report")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_what_the_results_say():
    assert report.filled(README, report.load(BENCHMARKS / "results")) == README


def test_a_changed_result_or_table_would_be_noticed(tmp_path, monkeypatch):
    results = report.load(BENCHMARKS / "results")
    results["families_cpu"]["rows"][1]["images_s_224"] += 0.1
    assert report.filled(README, results) != README
    edited = tmp_path / "README.md"
    for text, code in ((README, None), (README.replace("| 30.3 |", "| 40.3 |"), 1)):
        edited.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["report.py", "--check", "--readme", str(edited)])
        if code is None:
            report.main()
        else:
            with pytest.raises(SystemExit, match="its tables are not what the results say"):
                report.main()
        assert edited.read_text(encoding="utf-8") == text


def of_operators(ours=1.0, gla=6.0):
    rows = []
    for N, B, H in ((196, 128, 3), (4096, 8, 3), (16384, 2, 3), (64, 256, 2)):
        shape = {"N": N, "B": B, "H": H, "backward": True, "floor_ms": 0.25 * N * B / 25088}
        for form, ms, saved in (("ours", ours, 10.0), ("chunk_gla", gla, 45.0), ("sdpa", 2.0, 9.0)):
            time = ms * N * B / 25088
            rows.append({**shape, "form": form, "status": "ok", "ms": time, "saved_mib": saved})
    return {**HEADER, "what": "operators", "bandwidth": 1e12, "rows": rows}


def of_models(*, speed=2.0, batch=256):
    rows = []
    for compiled in (True, False):
        for size, images in ((224, batch), (512, 64), (1024, 16), (2048, 4)):
            for model in ("metala_tiny", "deit_tiny_patch16_224", "gla_tiny"):
                for what in ("training step", "inference"):
                    ours = model == "metala_tiny"
                    rate = 1e6 / size * (speed * size / 448 if ours else 1)
                    rows.append({
                        "model": model, "size": size, "compiled": compiled, "what": what,
                        "batch": images, "status": "ok", "ms": 1e3 * images / rate,
                        "images_s": rate, "peak_mib": 900.0 if ours else 800.0, "kernels": 300,
                    })  # fmt: skip
    return {**HEADER, "what": "models", "rows": rows}


def of_step():
    parts = {"GLU": 3.0, "operator": 2.0, "projections": 1.5, "norms": 0.3}
    rows = [
        {"phase": f"{way} {phase}", "status": "ok", "ms": 8.0, "idle": 1.2, "parts": parts}
        for way in ("eager", "compiled")
        for phase in ("forward", "backward")
    ]
    fields = {"model": "metala_tiny", "batch": 256, "size": 224}
    return {**HEADER, "what": "step", **fields, "rows": rows}


def test_goals_are_ratios_of_one_run_beside_their_bound():
    found = report.goals(of_operators(), of_models())
    figures = [goal.figure for goal in found]
    # chunk_gla 6 to 1, saved 45 to 10, 1 ms to a floor of 0.25, time in proportion to tokens;
    # twice 224/448 and 1024/448 of DeiT's speed, 900 MiB to 800.
    expected = [6, 4.5, 4, 6, 4.5, 4, 1, 1, 2 * 1024 / 448, 900 / 800]
    assert figures == pytest.approx(expected)
    reached = [goal.cells[2] for goal in found]
    assert reached == ["yes", "yes", "no"] * 2 + ["yes"] * 4


@pytest.mark.parametrize(
    ("operators", "models", "not_run"),
    [({}, {}, 10), (of_operators(), {}, 3), ({}, of_models(), 7)],
)
def test_what_was_not_measured_is_not_run(operators, models, not_run):
    cells = [goal.cells for goal in report.goals(operators, models)]
    assert [c[1:] for c in cells].count(("not run", "not run")) == not_run


def test_the_goals_are_those_of_one_batch_on_both_sides():
    goals = report.goals({}, of_models(batch=128))
    assert [goal.cells[1] for goal in goals[7:]] == ["batch 128", "4.57", "batch 128"]


def test_a_row_that_failed_gives_no_figure_and_its_cell_says_why():
    models = of_models()
    for row in models["rows"]:
        if row["model"] == "deit_tiny_patch16_224" and row["size"] == 1024:
            row["status"] = "out of memory"
            del row["images_s"], row["peak_mib"]
        if row["model"] == "gla_tiny" and row["size"] == 512:
            row["status"] = "failed: RuntimeError: x"
            del row["images_s"], row["peak_mib"]
    assert report.goals({}, models)[8].cells[1:] == ("out of memory", "not run")
    text = report.models_section({"models": models})
    deit = next(line for line in text.splitlines() if "deit_tiny" in line)
    assert deit.count("out of memory") == 3 and "(1.00)" in deit
    gla = next(line for line in text.splitlines() if "gla_tiny" in line)
    assert gla.count("| failed |") == 2 and "RuntimeError" not in text


@pytest.mark.parametrize(("figure", "cells"), [(1.15, "yes"), (1.1501, "no"), (None, "not run")])
def test_a_ceiling_is_reached_from_below(figure, cells):
    goal = report.Goal("x", {"ms": figure}, {"ms": 1.0}, "ms", 1.15, ceiling=True)
    assert goal.cells[2] == cells


def written(folder, **results):
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def test_only_files_of_a_gpu_are_taken_for_one(tmp_path):
    written(tmp_path, operators=of_operators(), models={**of_models(), "gpu": False})
    assert set(report.load(tmp_path)) == {"operators"}
    assert set(report.load(tmp_path, any_device=True)) == {"operators", "models"}


def test_a_second_time_nothing_changes_and_pictures_are_there(tmp_path, monkeypatch):
    written(tmp_path, operators=of_operators(), models=of_models(), step=of_step())
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text(README, encoding="utf-8")
    flags = ["--results", str(tmp_path), "--readme", str(readme), "--docs", str(docs)]
    monkeypatch.setattr(sys, "argv", ["report.py", *flags])
    kept = []
    for _ in range(2):
        report.main()
        kept.append({path.name: path.read_bytes() for path in (readme, *docs.iterdir())})
    assert kept[0] == kept[1] and kept[0]["README.md"].decode() != README
    assert set(kept[0]) == {"README.md", "operators_gpu.png", "models_gpu.png", "step_gpu.png"}
    for name in set(kept[0]) - {"README.md"}:
        assert f"](docs/{name})" in kept[0]["README.md"].decode()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check", *flags])
    report.main()
    (docs / "step_gpu.png").unlink()
    with pytest.raises(SystemExit, match=r"docs/step_gpu\.png"):
        report.main()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- report: goals -->", "", "has the sections"),
        ("<!-- report: goals -->", "<!-- report: nix -->", "has the sections .*'nix'"),
        ("<!-- /report -->", "", "no <!-- /report -->"),
    ],
)
def test_a_section_that_is_missing_or_unknown_is_named(old, new, message):
    with pytest.raises(UserError, match=message):
        report.filled(README.replace(old, new), {})
