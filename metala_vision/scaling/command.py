"""`metala-vision scaling MODEL ...`: time and memory of a pass as the images grow.

Every model and size is measured in several rounds over all of them, each time in a process of its
own (point.py), so that memory is that of the point, and one that needs too much of it or of
time is a cell of the table. What is measured is kept: a command that was stopped goes on.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import ceil, inf
from pathlib import Path
from typing import Any

from metala_vision.errors import UserError, one_line
from metala_vision.files import write_text

from .point import Point, is_full
from .table import OVER, Measured, as_csv, as_markdown, series, summary, with_growth

MODELS = ("metala_tiny", "attention_tiny", "deit_tiny_patch16_224")
SIZES = (224, 384, 512, 768, 1024, 1536, 2048)
MODES = {"inference": ("inference",), "train": ("train",), "both": ("inference", "train")}
RESULTS_FILE, TABLE_FILE, CSV_FILE, PICTURE_FILE = (
    "scaling.json", "scaling.md", "scaling.csv", "scaling.png",
)  # fmt: skip
GRACE = 60  # seconds beside its limit in which a process starts and ends by itself


@dataclass
class ScalingConfig:
    """What is measured, and how; memory_limit in GiB, None for what is available."""

    models: list[str] = field(default_factory=lambda: list(MODELS))
    sizes: list[int] = field(default_factory=lambda: list(SIZES))
    mode: str = "inference"
    batch_size: int = 1
    patch_size: int | None = None
    mixed_precision: str = "no"
    seconds: float = 2.0
    rounds: int = 3
    limit: float = 300.0
    memory_limit: float | None = None
    allocator: str = "keep"

    def check(self) -> None:
        """UserError, naming the flag, for a value that cannot be."""
        for flag, given in (("models", self.models), ("--sizes", [*map(str, self.sizes)])):
            twice = [value for value in given if given.count(value) > 1]
            if twice or not given:
                got = f"{twice[0]} twice" if twice else "none"
                raise UserError(f"{flag} needs one or more, each once, got {got}")
        for flag, value in (
            ("--sizes", min(self.sizes)), ("--batch-size", self.batch_size),
            ("--rounds", self.rounds),
            ("--patch-size", 1 if self.patch_size is None else self.patch_size),
        ):  # fmt: skip
            if value < 1:
                raise UserError(f"{flag} needs 1 or more, got {value}")
        for flag, value in (
            ("--seconds", self.seconds), ("--limit", self.limit),
            ("--memory-limit", 1 if self.memory_limit is None else self.memory_limit),
        ):  # fmt: skip
            if not 0 < value < inf:
                raise UserError(f"{flag} needs a number above 0, got {value:g}")

    def points(self) -> Iterator[tuple[int, Point]]:
        """Round and point, the models of a size one after the other: they share its noise."""
        shared = {k: getattr(self, k) for k in Point.__dataclass_fields__ if hasattr(self, k)}
        for turn in range(self.rounds):
            for size in sorted(self.sizes):
                for mode in MODES[self.mode]:
                    for model in self.models:
                        yield turn, Point(**{**shared, "model": model, "size": size, "mode": mode})


@dataclass(frozen=True)
class Grid:
    """What of a model is known without its weights.

    patch: height and width in px of what the model begins with, where that is timm's PatchEmbed; of
        another model the stride of its last features.
    """

    patch: tuple[int, int]
    parameters: int

    def tokens(self, size: int) -> int:
        return ceil(size / self.patch[0]) * ceil(size / self.patch[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command; each is a field of ScalingConfig, but --output."""
    add, config = parser.add_argument, ScalingConfig()
    add("models", nargs="*", metavar="MODEL", help=f"timm models [{' '.join(MODELS)}]")
    add("--sizes", nargs="+", type=int, default=list(SIZES), metavar="PX",
        help=f"sides of the images [{' '.join(map(str, SIZES))}]")  # fmt: skip
    add("--mode", choices=MODES, default="inference",
        help="train: forward and backward, without an optimizer [inference]")  # fmt: skip
    add("--output", type=Path, default=Path("runs/scaling"), help="folder [runs/scaling]")
    add("--batch-size", type=int, default=1, help="[1]")
    add("--patch-size", type=int, help="[the model's own]")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], default="no", help="[no]")
    add("--seconds", type=float, default=config.seconds,
        help=f"of timed passes, each point and round [{config.seconds:g}]")  # fmt: skip
    add("--rounds", type=int, default=config.rounds,
        help=f"through all points [{config.rounds}]")  # fmt: skip
    add("--limit", type=float, default=config.limit, metavar="SECONDS",
        help=f"of a point's process, once torch is there [{config.limit:g}]")  # fmt: skip
    add("--memory-limit", type=float, metavar="GIB",
        help="that a point may take beyond torch itself [the memory available when it starts; of a "
        "GPU, all]")  # fmt: skip
    add("--allocator", choices=["keep", "system"], default="keep",
        help="keep: malloc keeps freed memory: no pass faults it in again [keep]")  # fmt: skip


def run(given: argparse.Namespace) -> int:
    """Measure what the flags ask for; the last lines printed are the table and its path."""
    values = {key: value for key, value in vars(given).items() if key != "output"}
    values["models"] = values["models"] or list(MODELS)
    measured, text = scaling(ScalingConfig(**values), given.output)
    print(text, end="")
    print(given.output / TABLE_FILE)
    return 1 if any(m.error for m in measured) else 0


def scaling(config: ScalingConfig, output: Path) -> tuple[list[Measured], str]:
    """Measure; write scaling.json, .csv and .md after every process, and .png at the end.

    What scaling.json in `output` holds, measured with the same settings on the same machine, is not
    measured again, but for errors.

    Returns:
        A Measured for each mode, model and size, and the table as text.
    Raises:
        UserError: for values that cannot be, an unknown model, a size that its patches do not
            divide, a folder that cannot be written. All before anything is measured.
    """
    machine, grids = prepared(config)
    visits = _opened(output)
    done: dict[tuple[str, str, int], list[dict[str, Any]]] = {}

    def tables() -> tuple[list[Measured], str]:
        rows = [
            summary(mode, model, size, grids[model].tokens(size), grids[model].parameters,
                    done[mode, model, size])
            for mode in MODES[config.mode] for model in config.models
            for size in sorted(config.sizes)
            if (mode, model, size) in done
        ]  # fmt: skip
        for part in series(rows).values():
            with_growth(part)
        text = as_markdown(rows, _described(config, machine))
        write_text(output / CSV_FILE, as_csv(rows))
        write_text(output / TABLE_FILE, text)
        return rows, text

    for turn, point in config.points():
        settings = asdict(point)
        of_point = done.setdefault((point.mode, point.model, point.size), [])
        if of_point and "passes" not in of_point[-1]:
            continue  # what an earlier round could not, a later one cannot
        found = next((v for v in visits if _counts(v, settings, turn, machine)), None)
        if found is None:
            print(f"round {turn + 1}: {point.model} {point.size} px {point.mode}", end=" ",
                  flush=True)  # fmt: skip
            found = {**settings, "round": turn, "machine": machine, **measure(point)}
            visits[:] = [v for v in visits if not _same(v, found)] + [found]
            write_text(output / RESULTS_FILE, _as_json(visits))
            print(_outcome(found), flush=True)
        of_point.append(found)
        tables()
    measured, text = tables()
    from .pictures import scaling_curves

    patches = {grids[name].patch for name in config.models}
    scaling_curves(measured, output / PICTURE_FILE, patches.pop() if len(patches) == 1 else None)
    return measured, text


def prepared(config: ScalingConfig) -> tuple[dict[str, Any], dict[str, Grid]]:
    """The machine, and each model's grid.

    Raises:
        UserError: for values that cannot be, an unknown model, a size that its patches do not
            divide.
    """
    config.check()
    return _machine(config), {name: _grid(name, config) for name in config.models}


def measure(point: Point) -> dict[str, Any]:
    """One process: {"passes": seconds each, "memory_mib"}, or {"full"}, {"over"} or {"error"}."""
    from metala_vision.children import own_environment

    told = [sys.executable, "-m", "metala_vision.scaling.point", json.dumps(asdict(point))]
    try:
        done = subprocess.run(
            told, capture_output=True, text=True, errors="replace", env=own_environment(),
            timeout=point.limit + GRACE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"over": point.limit}
    except OSError as error:
        return {"error": f"cannot start a process: {error.strerror}"}
    if done.returncode == -signal.SIGALRM:
        return {"over": point.limit}
    if done.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        with contextlib.suppress(ValueError):
            return json.loads(lines[-1])
    # SIGKILL is what the kernel sends where memory is short: we send none.
    if done.returncode == -signal.SIGKILL or is_full(done.stderr):
        return {"full": True}
    told = done.stderr.strip().splitlines()
    return {"error": one_line(told[-1]) if told else f"exit status {done.returncode}"}


def _same(visit: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both say how the same was measured, whatever was found."""
    keys = [*Point.__dataclass_fields__, "round", "machine"]
    return all(visit.get(key) == other[key] for key in keys)


def _counts(visit: dict[str, Any], settings: dict[str, Any], turn: int, machine: Any) -> bool:
    """Whether a visit of a command before stands for one that is asked for now."""
    if "error" in visit or ("full" in visit and visit.get("memory_limit") is None):
        return False  # another time more may be free
    if "passes" in visit:  # within the limits, which then change nothing
        settings = settings | {key: visit.get(key) for key in ("limit", "memory_limit")}
    return _same(visit, {**settings, "round": turn, "machine": machine})


def _outcome(found: dict[str, Any]) -> str:
    if "passes" in found:
        passes = sorted(found["passes"])
        return f"{1000 * passes[len(passes) // 2]:.4g} ms a pass, {found['memory_mib']:.0f} MiB"
    if "over" in found:
        return f"{OVER} {found['over']:g} s"
    return "out of memory" if "full" in found else f"failed: {found['error']}"


def _machine(config: ScalingConfig) -> dict[str, Any]:
    """What times depend on besides the settings."""
    import timm
    import torch

    from metala_vision._version import __version__
    from metala_vision.run_folder import code_version

    on_gpu = torch.cuda.is_available()
    if config.mixed_precision == "fp16" and not on_gpu:
        raise UserError("--mixed-precision fp16 needs a GPU; on a CPU: no, bf16")
    name = "CPU"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return {
        "device": torch.cuda.get_device_name() if on_gpu else name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "metala_vision": __version__,
        "code": code_version(),
    }


def _grid(name: str, asked: ScalingConfig) -> Grid:
    """Of a model, built without memory for weights, its sizes checked.

    Raises:
        UserError: for an unknown model, one that takes no such patch, a size that does not fit.
    """
    import torch

    from metala_vision.build import create_model
    from metala_vision.config import ModelConfig

    own = asked.patch_size
    if own is not None:
        _check_sizes(asked.sizes, (own, own), "")
    # The model's own size need not be a multiple of another patch.
    config = ModelConfig(model=name, patch_size=own, img_size=asked.sizes[0] if own else None)
    with torch.device("meta"):
        model: Any = create_model(config, 1000)
    parameters = sum(p.numel() for p in model.parameters())
    ratio: Any = getattr(getattr(model, "patch_embed", None), "feat_ratio", None)
    if ratio is not None:  # timm's PatchEmbed, and its hybrids with a CNN below
        patch: Any = ratio(as_scalar=False)
        patch = (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
        _check_sizes(asked.sizes, patch, f" of {name}")
        return Grid(patch, parameters)
    info: Any = getattr(model, "feature_info", None)
    stride = int(info[-1]["reduction"]) if info else 32
    return Grid((stride, stride), parameters)


def _check_sizes(sizes: list[int], patch: tuple[int, int], whose: str) -> None:
    for size in sizes:
        if size < max(patch) or size % patch[0] or size % patch[1]:
            raise UserError(
                f"--sizes needs multiples of the patch{whose}, {patch[0]}x{patch[1]} px, got {size}"
            )


def _described(config: ScalingConfig, machine: dict[str, Any]) -> str:
    """How it was measured, as a line of the table."""
    precision = {"no": "float32"}.get(config.mixed_precision, config.mixed_precision)
    limit = "what was free" if config.memory_limit is None else f"{config.memory_limit:g} GiB"
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return (
        f"{machine['device']}, {threads} of {machine['cores']} cores, torch {machine['torch']}, "
        f"metala-vision {machine['metala_vision']}; batch {config.batch_size}, {precision}; "
        f"{config.rounds} round{'s' * (config.rounds > 1)} of {config.seconds:g} s, "
        f"allocator {config.allocator}, memory limit {limit}."
    )


def _as_json(visits: list[dict[str, Any]]) -> str:
    """One visit a line."""
    return "[\n" + ",\n".join(json.dumps(visit) for visit in visits) + "\n]\n"


def _opened(output: Path) -> list[dict[str, Any]]:
    """What the folder holds already; it is there and can be written afterwards."""
    path = output / RESULTS_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f"{RESULTS_FILE}.new"
        probe.write_text("")
        probe.unlink()
        text = path.read_text(encoding="utf-8") if path.exists() else "[]"
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    try:
        visits = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is no result of this command: {one_line(error)}") from error
    if not isinstance(visits, list) or not all(isinstance(v, dict) for v in visits):
        raise UserError(f"{path} is no result of this command; name another --output")
    return visits
