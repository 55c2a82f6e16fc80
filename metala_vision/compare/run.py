"""A comparison from its members to its report: every run a process of its own.

A run is resumed where it was stopped, and one that fails is a row with its error.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from metala_vision.build import create_model
from metala_vision.errors import UserError
from metala_vision.flops import count_flops
from metala_vision.run_folder import METRICS_FILE, RESULT_FILE, check_same, read_metrics
from metala_vision.scaling import ScalingConfig, scaling
from metala_vision.scaling.pictures import scaling_curves

from .comparison import CompareConfig, Member, check_matched, member_config
from .estimates import estimate, places
from .published import PUBLISHED
from .report import Scaled, write_report
from .sweep import Sweep
from .table import Row, write_tables, write_text

Result = dict[str, Any]


def compare(
    comparison: CompareConfig, output: Path, seconds: float = 5.0,
    devices: Sequence[str | None] = (None,), title: str = "comparison",
) -> list[Row]:  # fmt: skip
    """Train and measure every member; write tables, pictures and the report into `output`.

    What is finished there is not done again. The tables are written after every run.

    Args:
        seconds: for each part of a speed; 0 measures none.
        devices: CUDA_VISIBLE_DEVICES of each of the runs that train at a time; speeds are measured
            one after the other, on the first.
        title: of the report.
    Raises:
        UserError: for members that do not match, and a folder that cannot be written.
        Stopped: by a signal; the runs are saved.
    """
    check_matched(comparison)
    try:
        (output / "configs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    rows = [Row(member.name, member.model) for member in comparison.members]
    found: list[dict[int, Result]] = [{} for _ in rows]  # by member, then seed
    with Sweep(devices) as sweep:
        which = [(i, seed) for i in range(len(rows)) for seed in comparison.seeds]
        jobs: list[Callable[[], Result | str]] = [
            partial(_train, sweep, comparison, comparison.members[i], seed, output)
            for i, seed in which
        ]
        for number, result in sweep.each(jobs):
            i, seed = which[number]
            if isinstance(result, str):
                rows[i].errors.append(f"seed {seed}: {result}")
            else:
                found[i][seed] = result
            _fill(comparison, rows, found)
            write_tables(rows, output)
    if seconds:
        with Sweep(devices[:1]) as sweep:
            for member, row in zip(comparison.members, rows, strict=True):
                if row.top1 is not None:
                    _measure(sweep, comparison, member, output, seconds, row)
    write_tables(rows, output)
    scaled = _scaled(comparison, rows, output, seconds) if seconds else None
    write_report(comparison, rows, output, title, scaled)
    return rows


def _scaled(
    comparison: CompareConfig, rows: list[Row], output: Path, seconds: float
) -> Scaled | None:
    """How the models that were trained grow with resolution; those with arguments are left out."""
    configs = [member_config(comparison, m, comparison.seeds[0]) for m in comparison.members]
    models = [
        config.model.model
        for config, row in zip(configs, rows, strict=True)
        if row.top1 is not None and not config.model.model_kwargs
    ]
    if not comparison.sizes or not models:
        return None
    asked = ScalingConfig(
        models=list(dict.fromkeys(models)), sizes=comparison.sizes, seconds=seconds,
        patch_size=configs[0].model.patch_size, mixed_precision=configs[0].run.mixed_precision,
        rounds=1,
    )  # fmt: skip
    measured, text = scaling(asked, output / "scaling")
    picture = output / "scaling" / "scaling.svg"
    scaling_curves(measured, picture, None, stacked=True)
    return Scaled(text, picture.read_text(encoding="utf-8"))


def _train(
    sweep: Sweep, comparison: CompareConfig, member: Member, seed: int, output: Path
) -> Result | str:
    """The result of a run, finished before or now, or the line of its error."""
    run_dir = output / f"{member.name}-{seed}"
    config = _write_config(comparison, member, seed, output)
    if (run_dir / RESULT_FILE).is_file():
        print(f"{member.name}, seed {seed}: finished before", flush=True)
    else:
        print(f"{member.name}, seed {seed}", flush=True)
        flags = ["--config", str(config), "--run-dir", str(run_dir), "--resume", "auto"]
        error = sweep.run("train", flags, output / f"{run_dir.name}.txt")
        if error is not None:
            return error
    return _result(run_dir)


def _result(run_dir: Path) -> Result:
    result = json.loads((run_dir / RESULT_FILE).read_text())
    lines = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    return {**result, "seconds": lines[-1]["seconds"] if lines else None}


def _write_config(comparison: CompareConfig, member: Member, seed: int, output: Path) -> Path:
    """The file of one run; one that lies there must say the same."""
    config = member_config(comparison, member, seed)
    path = output / "configs" / f"{member.name}-{seed}.yaml"
    if path.is_file():
        check_same(config, path, f"the run of {member.name} in {output}")
    else:
        write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return path


def _fill(comparison: CompareConfig, rows: list[Row], found: list[dict[int, Result]]) -> None:
    """What the runs so far tell."""
    for member, row, results in zip(comparison.members, rows, found, strict=True):
        if not results:
            continue
        by_seed = [results[seed] for seed in comparison.seeds if seed in results]
        row.top1, row.top5 = (estimate([r[k] for r in by_seed]) for k in ("top1", "top5"))
        seconds = [r["seconds"] for r in by_seed if r["seconds"] is not None]
        row.minutes = fmean(seconds) / 60 if seconds else None
        first = by_seed[0]
        row.parameters, row.steps = first["parameters"], first["steps"]
        config = member_config(comparison, member, comparison.seeds[0]).model
        if row.gflops is None:
            size = tuple(first["input_size"])
            config.img_size = size[-1]
            with torch.device("meta"):
                model = create_model(config, first["classes"])
            row.gflops = count_flops(model, size) / 1e9
        if not config.model_kwargs:
            row.published = PUBLISHED.get(member.model)
    trained = [row for row in rows if row.top1 is not None]
    for row, place in zip(trained, places([row.top1 for row in trained if row.top1]), strict=True):
        row.place = place


def _measure(
    sweep: Sweep, comparison: CompareConfig, member: Member, output: Path, seconds: float, row: Row
) -> None:  # fmt: skip
    path = output / f"{member.name}-speed.json"
    if not path.is_file():
        print(f"{member.name}, speed", flush=True)
        config = _write_config(comparison, member, comparison.seeds[0], output)
        flags = ["--config", str(config), "--seconds", str(seconds), "--json", str(path)]
        error = sweep.run("bench", flags, output / f"{member.name}-speed.txt")
        if error is not None:
            row.errors.append(f"speed: {error}")
            return
    speed = json.loads(path.read_text())
    row.train_img_s, row.inference_img_s = speed["step"], speed["evaluation"]
    row.memory_mib = speed["memory_mib"]
