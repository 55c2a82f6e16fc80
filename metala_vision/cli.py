"""The command line: `metala-vision COMMAND`, and `python train_imagenet.py` for its `train`."""

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__
from .config import SECTIONS, Config
from .config_file import load_config, shipped_comparisons, shipped_configs
from .errors import ReportedError, Stopped, UserError, nearest
from .files import write_text
from .flags import add_flags, overrides_of
from .flags import value_of as _value

COMMANDS = {
    "train": "train a model on a folder of images",
    "eval": "evaluate a checkpoint on a folder of images",
    "predict": "tell the likeliest classes of images",
    "features": "judge the frozen features of a model: kNN and linear probe",
    "bench": "measure loader, training step and evaluation of a configuration",
    "compare": "train several models under one recipe, as one table",
    "scaling": "measure time and memory of models as the images grow",
    "weights": "list, download, verify and publish pretrained weights",
    "export": "write a model as one file that runs without this package, and prove it",
    "visualize": "draw scan orders, attention maps, receptive fields, memory",
    "probe": "try token mixers on synthetic tasks",
}


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None, prog: str = "metala-vision", command: str = "") -> int:
    """Run one command and return the exit status.

    Args:
        argv: arguments after the program's name; None takes the process's.
        command: the command where `argv` names none.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not command or (arguments and arguments[0] in COMMANDS):
            parser = _Parser(prog, description=__doc__, formatter_class=_Formatter)
            parser.add_argument("--version", action="version", version=__version__)
            listed = ", ".join(f"{name} ({what})" for name, what in COMMANDS.items())
            parser.add_argument("command", choices=COMMANDS, help=listed)
            command = parser.parse_args(arguments[:1]).command
            arguments = arguments[1:]
        run = {
            "train": train_command, "eval": eval_command, "predict": predict_command,
            "features": features_command, "bench": bench_command,
            "compare": compare_command, "scaling": scaling_command,
            "export": export_command,
            "visualize": visualize_command, "weights": weights_command, "probe": probe_command,
        }[command]  # fmt: skip
        return run(arguments, f"{prog} {command}")
    except ReportedError:  # by another process
        return 2
    except UserError as error:
        print(f"{prog}: error: {error.line}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if str(stopped):
            print(f"{prog}: {stopped}", file=sys.stderr)
        return stopped.status
    except BrokenPipeError:  # of `| head`; Python would complain once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; checkpoints that were complete are kept", file=sys.stderr)
        return 130


def entry_point() -> NoReturn:
    """`metala-vision`."""
    sys.exit(main())


def train_command(argv: list[str], prog: str) -> int:
    """Train; the last line printed is the top-1."""
    config, name = parse_config(argv, prog)
    # Imported here: --help and a mistake in the arguments need none of the training libraries.
    from .train import train

    with warnings.catch_warnings():
        # torch tells a machine without an accelerator so at every loader.
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        # Of the 3x3 depthwise weights over several processes: a copy of a few kilobytes.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        result = train(config, name)
    if int(os.environ.get("RANK", "0")):
        return 0  # the main process tells
    print(f"curve       {result.run_dir / 'curve.png'}")
    print(f"checkpoint  {result.run_dir / 'last'}  (timm.create_model reads local-dir:FOLDER)")
    print(
        f"top-1 {result.last.top1:.2f} % on {result.last.images:,} held-out images "
        f"(best {result.best.top1:.2f} % after epoch {result.best_epoch:g})"
    )
    return 0


def eval_command(argv: list[str], prog: str) -> int:
    """Evaluate; the last line printed is the top-1."""
    parser = _Parser(
        prog, description="Evaluate a checkpoint, each image once.", formatter_class=_Formatter
    )
    parser.add_argument("checkpoint", help="folder that a run left, or a timm model's name")
    parser.add_argument("--data-dir", type=Path, help="holds val/, or class folders itself; "
                        "default $METALA_VISION_DATA")  # fmt: skip
    parser.add_argument("--labels", type=Path, metavar="FILE", help="JSON, several labels an image")
    parser.add_argument("--batch-size", type=int, default=128, help="[128]")
    parser.add_argument("--workers", type=int, default=4, help="[4]")
    parser.add_argument("--max-unreadable", type=float, default=0.001, help="[0.001]")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument(
        "--known-classes", action="store_true",
        help="leave out the images of classes that the model was not trained on",
    )  # fmt: skip
    parser.add_argument("--per-class", type=Path, metavar="FILE", help="a CSV file to write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE")
    given = vars(parser.parse_args(argv))
    if given["batch_size"] < 1 or given["workers"] < 0 or not 0 <= given["max_unreadable"] <= 1:
        raise UserError("--batch-size needs >= 1, --workers >= 0, --max-unreadable 0 to 1")
    data_dir = given.pop("data_dir") or os.environ.get("METALA_VISION_DATA")
    if data_dir is None:
        raise UserError("no data folder: give --data-dir DIR or set METALA_VISION_DATA")
    out, extra = given.pop("json"), _value("model_kwargs", given.pop("model_kwargs"))
    for path in (out, given["per_class"]):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: No such folder")
    from .evaluate import as_lines, evaluate_checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        report = evaluate_checkpoint(
            given.pop("checkpoint"), Path(data_dir).expanduser(), **given, model_kwargs=extra
        )
    if int(os.environ.get("RANK", "0")):
        return 0  # the main process tells
    print(as_lines(report))
    if out is not None:
        write_json(out, report)
    return 0


def predict_command(argv: list[str], prog: str) -> int:
    """Tell the classes of images; exit status 1 where some cannot be read."""
    from .predict.command import add_arguments, run

    parser = _Parser(prog, description="The likeliest classes of images.",
                     formatter_class=_Formatter)  # fmt: skip
    add_arguments(parser)
    return run(parser.parse_args(argv))


def features_command(argv: list[str], prog: str) -> int:
    """Judge frozen features; the last line printed is their top-1."""
    from .features.command import DATA_KEYS, add_arguments, run

    parser = _Parser(
        prog, description="kNN and linear probe on the frozen features of a model.",
        formatter_class=_Formatter, allow_abbrev=False,
    )  # fmt: skip
    add_arguments(parser)
    add_flags(parser.add_argument_group("data", "Which images, and which are held out."), "data",
               DATA_KEYS)  # fmt: skip
    given = parser.parse_args(argv)
    data = load_config(None, overrides_of(given)).data
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        return run(given, data, _value("model_kwargs", given.model_kwargs))


def bench_command(argv: list[str], prog: str) -> int:
    """Measure; the last line printed is the speed that a run would have."""
    parser = _Parser(
        prog, description="Measure a configuration: the flags of train, and these.",
        formatter_class=_Formatter, add_help=False, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10.0, help="for each part [10]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument("-h", "--help", action="store_true", help="this, and train's flags")
    given, flags = parser.parse_known_args(argv)
    if given.help:
        parser.print_help()
        flags = ["--help"]
    if not 0 < given.seconds < float("inf"):
        raise UserError(f"--seconds needs a number above 0, got {given.seconds}")
    if given.json is not None and not given.json.parent.is_dir():
        raise UserError(f"cannot write {given.json}: No such folder")
    config, _ = parse_config(flags, prog)
    from .bench import as_lines, bench

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        speed = bench(config, given.seconds)
    print(as_lines(speed))
    if given.json is not None:
        write_json(given.json, speed)
    return 0


def compare_command(argv: list[str], prog: str) -> int:
    """Compare; the last lines printed are the table and its path."""
    parser = _Parser(
        prog, description="Train several models under one recipe; a comparison that was stopped "
        "goes on.", formatter_class=_Formatter,
        epilog=f"comparisons that ship: {', '.join(shipped_comparisons())}",
    )  # fmt: skip
    parser.add_argument("comparison", help="YAML file, or one that ships: compare/quickstart")
    parser.add_argument("--output", type=Path, help="folder [runs/compare-NAME of the file]")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each part of a speed; 0: no speeds [5]"
    )
    parser.add_argument(
        "--gpus",
        metavar="LIST",
        help="train a run on each of them at a time, as 0,1,2; of those "
        "that CUDA_VISIBLE_DEVICES names, where it is set",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time on each GPU of --gpus; without it, on the first, or the CPU [1]",
    )
    given = parser.parse_args(argv)
    if not 0 <= given.seconds < float("inf"):
        raise UserError(f"--seconds needs a number of 0 or more, got {given.seconds}")
    if given.jobs < 1:
        raise UserError(f"--jobs needs 1 or more, got {given.jobs}")
    devices = _devices(given.gpus) * given.jobs
    from .compare import as_markdown, compare, load_comparison
    from .compare.report import REPORT_FILE

    comparison = load_comparison(given.comparison)
    stem = Path(given.comparison).stem
    output = given.output or Path("runs") / f"compare-{stem}"
    rows = compare(comparison, output, given.seconds, devices, f"Comparison: {stem}")
    print(as_markdown(rows))
    print(output / REPORT_FILE)
    return 1 if any(row.errors for row in rows) else 0


def _devices(gpus: str | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each of the GPUs asked for; each must be there, and once."""
    if gpus is None:
        return [None]
    import torch

    count, given = torch.cuda.device_count(), gpus.split(",")
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if mask is None else mask.split(",")
    for gpu in given:
        if not gpu.isdecimal() or int(gpu) >= count:
            raise UserError(f"--gpus: no GPU {gpu!r}, {count} can be used")
        if given.count(gpu) > 1:
            raise UserError(f"--gpus: GPU {gpu} is given twice")
    return [names[int(gpu)].strip() for gpu in given]


def scaling_command(argv: list[str], prog: str) -> int:
    """Measure; the last lines printed are the table and its path."""
    from .scaling import add_arguments, run

    parser = _Parser(
        prog, description="Time and memory of models as the images grow; a measurement that was "
        "stopped goes on.", formatter_class=_Formatter, allow_abbrev=False,
    )  # fmt: skip
    add_arguments(parser)
    return run(parser.parse_args(argv))


def write_json(path: Path, values: Any) -> None:
    """A dataclass, as JSON."""
    write_text(path, json.dumps(dataclasses.asdict(values), indent=2) + "\n")


def export_command(argv: list[str], prog: str) -> int:
    """Export; the last line printed is the path of the file."""
    from .export import add_arguments, run

    parser = _Parser(
        prog, description="Write a model as one file that runs without this package, once it is "
        "proven to compute the same.", formatter_class=_Formatter,
    )  # fmt: skip
    add_arguments(parser)
    given = parser.parse_args(argv)
    given.model_kwargs = _value("model_kwargs", given.model_kwargs)
    return run(given)


def visualize_command(argv: list[str], prog: str) -> int:
    """Draw a picture; the last line printed is its path."""
    from .visualize.command import add_arguments, draw

    parser = _Parser(prog, description="Draw a picture.", formatter_class=_Formatter)
    add_arguments(parser)
    given = parser.parse_args(argv)
    if "model_kwargs" in given:
        given.model_kwargs = _value("model_kwargs", given.model_kwargs)
    print(draw(given))
    return 0


def probe_command(argv: list[str], prog: str) -> int:
    """Probe; what is printed last is the table, or its path."""
    from .probe.command import add_arguments, run

    parser = _Parser(prog, description="Try token mixers.", formatter_class=_Formatter)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def weights_command(argv: list[str], prog: str) -> int:
    """Weights; what is printed last is the result."""
    from .publish.command import add_arguments, run

    parser = _Parser(prog, description="Pretrained weights.", formatter_class=_Formatter)
    add_arguments(parser)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        return run(parser.parse_args(argv))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def parse_config(argv: list[str], prog: str) -> tuple[Config, str]:
    """The configuration that the arguments ask for, and the run's name.

    Every key of every section is a flag: `--lr 1e-3`, `--betas 0.9 0.98`,
    `--model-kwargs conv=none`.
    """
    parser = _Parser(
        prog,
        description="Train a model on images. A flag overrides the same key of the configuration.",
        epilog=f"configurations that ship: {', '.join(shipped_configs())}",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of a shipped one")
    flags = ["--config"]
    for section, schema in SECTIONS.items():
        group = parser.add_argument_group(section, schema.__doc__)
        flags += add_flags(group, section, schema.model_fields)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}{nearest(unknown[0], flags)}")
    overrides = overrides_of(given)
    resume = overrides.get("run", {}).get("resume")
    if resume not in (None, "auto") and given.config is None:
        folder = Path(resume).expanduser()
        given.config, name = str(folder / "config.yaml"), folder.resolve().name
        if not Path(given.config).is_file():
            raise UserError(f"--resume {resume}: no run in it, config.yaml is missing")
        # Wherever it lay when it was begun.
        overrides["run"].setdefault("run_dir", str(folder))
    else:
        name = (given.config or "train").replace("\\", "/").split("/")[-1]
    return load_config(given.config, overrides), name.removesuffix(".yaml")
