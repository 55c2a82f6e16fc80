"""A comparison from its members to its report: every run a process of its own.

A run is resumed where it was stopped, and one that fails is a row with its error.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from metala_vision.build import create_model
from metala_vision.errors import UserError, one_line
from metala_vision.files import write_text
from metala_vision.flops import count_flops
from metala_vision.run_folder import CONFIG_FILE, RESULT_FILE, check_same
from metala_vision.scaling import ScalingConfig, prepared, scaling
from metala_vision.scaling.pictures import scaling_curves

from .comparison import CompareConfig, check_matched, member_config
from .estimates import estimate, places
from .published import PUBLISHED
from .report import Scaled, metrics_of, write_report
from .sweep import Sweep
from .table import Row, write_tables

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
    asked = _asked(comparison, seconds)
    if asked is not None:
        prepared(asked)  # a size that does not fit is told before days of training
    members, seeds = comparison.members, comparison.seeds
    which = [(i, seed) for i in range(len(members)) for seed in seeds]
    try:
        (output / "configs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    configs = _write_configs(comparison, output)
    rows = [Row(member.name, member.model) for member in members]
    found: list[dict[int, Result]] = [{} for _ in rows]  # by member, then seed
    with Sweep(devices) as sweep:
        jobs: list[Callable[[], Result | str]] = [
            partial(_train, sweep, f"{members[i].name}-{seed}", config, output)
            for (i, seed), config in zip(which, configs, strict=True)
        ]
        for number, result in sweep.each(jobs):
            i, seed = which[number]
            if isinstance(result, str):
                rows[i].errors.append(f"seed {seed}: {result}")
            else:
                found[i][seed] = result
            _fill(comparison, rows[i], i, found[i])
            _give_places(rows, len(seeds))
            write_tables(rows, output)
    if seconds:
        with Sweep(devices[:1]) as sweep:
            for row, config in zip(rows, configs[:: len(seeds)], strict=True):
                if row.top1 is not None:
                    _measure(sweep, row, config, output, seconds)
    write_tables(rows, output)
    asked = _asked(comparison, seconds, [row.name for row in rows if row.top1 is not None])
    scaled = None if asked is None else _scaled(asked, output)
    write_report(comparison, rows, output, title, seconds, scaled)
    return rows


def _asked(
    comparison: CompareConfig, seconds: float, names: Sequence[str] | None = None
) -> ScalingConfig | None:
    """What is timed over resolutions, if anything: the models of those members (None: of all),
    without those that have arguments."""
    configs = [
        member_config(comparison, member, comparison.seeds[0])
        for member in comparison.members
        if names is None or member.name in names
    ]
    models = [config.model.model for config in configs if not config.model.model_kwargs]
    if not comparison.sizes or not seconds or not models:
        return None
    return ScalingConfig(
        models=list(dict.fromkeys(models)), sizes=comparison.sizes, seconds=seconds, rounds=1,
        patch_size=configs[0].model.patch_size, mixed_precision=configs[0].run.mixed_precision,
    )  # fmt: skip


def _scaled(asked: ScalingConfig, output: Path) -> Scaled:
    """How the models grow with resolution."""
    measured, text = scaling(asked, output / "scaling")
    picture = output / "scaling" / "scaling.svg"
    scaling_curves(measured, picture, None, stacked=True)
    return Scaled(text, picture.read_text(encoding="utf-8"))


def _train(sweep: Sweep, name: str, config: Path, output: Path) -> Result | str:
    """The result of a run, finished before or now, or the line of its error."""
    run_dir = output / name
    result = _result(run_dir)
    if result is not None:
        print(f"{name}: finished before", flush=True)
        return result
    print(name, flush=True)
    flags = ["--config", str(config), "--run-dir", str(run_dir), "--resume", "auto"]
    error = sweep.run("train", flags, output / f"{name}.txt")
    return error or _result(run_dir) or f"{run_dir / RESULT_FILE} cannot be read"


def _result(run_dir: Path) -> Result | None:
    """What a finished run tells, and the seconds that it took; None where there is none to read."""
    try:
        result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
        {key: result[key] for key in ("parameters", "steps", "top1", "top5", "classes")}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return {**result, "seconds": max((x["seconds"] for x in metrics_of(run_dir)), default=None)}


def _write_configs(comparison: CompareConfig, output: Path) -> list[Path]:
    """The file of each run; where one has begun already, its file must say the same.

    Raises:
        UserError: where it does not, naming the key; before any file is written.
    """
    texts: dict[Path, str] = {}
    for member in comparison.members:
        for seed in comparison.seeds:
            config = member_config(comparison, member, seed)
            folder = config.data.data_dir or os.environ.get("METALA_VISION_DATA")
            if folder is not None and config.data.dataset != "digits":
                config.data.data_dir = Path(folder).expanduser().resolve()
            config.data.val_file = config.data.val_file and config.data.val_file.resolve()
            run = output / f"{member.name}-{seed}"
            path = output / "configs" / f"{run.name}.yaml"
            if (run / CONFIG_FILE).is_file():
                if not path.is_file():
                    raise UserError(f"{run} is there, but not {path}: take another folder")
                check_same(config, path, f"the run {run}", free={"data": {"workers"}})
            texts[path] = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _fill(comparison: CompareConfig, row: Row, i: int, results: dict[int, Result]) -> None:
    """What the runs of one member tell so far."""
    by_seed = [results[seed] for seed in comparison.seeds if seed in results]
    if not by_seed:
        return
    row.top1, row.top5 = (estimate([r[k] for r in by_seed]) for k in ("top1", "top5"))
    seconds = [r["seconds"] for r in by_seed if r["seconds"] is not None]
    row.minutes = fmean(seconds) / 60 if seconds else None
    first = by_seed[0]
    row.parameters, row.steps = first["parameters"], first["steps"]
    config = member_config(comparison, comparison.members[i], comparison.seeds[0]).model
    if not config.model_kwargs:
        row.published = PUBLISHED.get(row.model)
    if len(results) == 1:  # once for each member
        size = tuple(first["input_size"])
        config.img_size = size[-1]
        try:
            with torch.device("meta"):
                model = create_model(config, first["classes"])
            row.gflops = count_flops(model, size) / 1e9
        except Exception as error:  # whatever another library's model does on that device
            row.errors.append(f"FLOPs: {type(error).__name__}: {one_line(error)}")


def _give_places(rows: list[Row], seeds: int) -> None:
    """Where all rows have all their seeds; a row that lacks one may yet be anywhere."""
    estimates = [row.top1 for row in rows if row.top1 is not None and row.top1.count == seeds]
    found = places(estimates) if len(estimates) == len(rows) else [None] * len(rows)
    for row, place in zip(rows, found, strict=True):
        row.place = place


def _measure(sweep: Sweep, row: Row, config: Path, output: Path, seconds: float) -> None:
    """Speed and memory, measured before as long or now."""
    path = output / f"{row.name}-speed.json"
    speed = _speed(path)
    if speed is None or speed["seconds"] != seconds:
        print(f"{row.name}, speed", flush=True)
        flags = ["--config", str(config), "--seconds", str(seconds), "--json", str(path)]
        error = sweep.run("bench", flags, output / f"{row.name}-speed.txt")
        speed = _speed(path)
        if error is not None or speed is None:
            row.errors.append(f"speed: {error or f'{path} cannot be read'}")
            return
    row.train_img_s, row.inference_img_s = speed["step"], speed["evaluation"]
    row.memory_mib = speed["memory_mib"]


def _speed(path: Path) -> dict[str, Any] | None:
    try:
        speed = json.loads(path.read_text(encoding="utf-8"))
        return {key: speed[key] for key in ("step", "evaluation", "memory_mib", "seconds")}
    except (OSError, ValueError, LookupError, TypeError):
        return None
