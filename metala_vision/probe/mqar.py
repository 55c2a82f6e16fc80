"""Multi-query associative recall: which token mixers find again what they were told once.

Two causal blocks of each family read pairs of key and value and are asked for the values, in every
setting of length, width, learning rate and seed. A sweep that was stopped goes on.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metala_vision.errors import UserError, nearest
from metala_vision.files import write_text

from .mqar_sweep import CONVS, SETTINGS, Sweep, told

if TYPE_CHECKING:
    from .mqar_run import Progress, RecallRun

SHARED_FILE, RUNS = "sweep.json", "runs"
TABLE_FILE, CSV_FILE, JSON_FILE, PICTURE_FILE = "mqar.md", "mqar.csv", "mqar.json", "mqar.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; each overrides the value of the setting."""
    add = parser.add_argument
    add("--setting", choices=SETTINGS, default="small",
        help="small: minutes a run on a CPU core; published: MetaLA's section 6 on the data of "
        "Zoology's figure 2; hard: its table A7 [small]")  # fmt: skip
    add("--output", type=Path, help="folder [runs/mqar-SETTING]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[auto]")
    add("--mixers", nargs="+", metavar="FAMILY", help="[all that have a causal form]")
    add("--lengths", nargs="+", type=_length, metavar="LENGTH:PAIRS", help="[64:8; published: "
        "64:4 128:8 256:16 512:64; hard: 512:80]")  # fmt: skip
    add("--dims", nargs="+", type=int, metavar="WIDTH", help="[64; published: 64 128 256 512]")
    add("--learning-rates", nargs="+", type=float, metavar="RATE",
        help="[small: 4.64e-4 2.15e-3 1e-2; else four from 1e-4 to 1e-2, from length 512 on also "
        "four from 1e-5 to 1e-3]")  # fmt: skip
    add("--seeds", nargs="+", type=int, metavar="SEED", help="[0; small: 0 1 2]")
    add("--sweep-seeds", type=int, metavar="COUNT",
        help="so many of the seeds are trained at every learning rate, the others at the best of "
        "them alone [all; small: 1]")  # fmt: skip
    add("--conv", help=f"{CONVS} [published: MetaLA causal of width 2, Mamba of 4, else none]")
    add(
        "--mlp-ratio",
        type=float,
        help="of the channel mixers, 0: none [each family's own; small: 0]",
    )
    add("--precision", choices=["no", "bf16"], help="bf16: autocast [no]")
    add("--random-non-queries", action="store_true", default=None,
        help="random tokens in place of the filler")  # fmt: skip
    for name, kind, text in (
        ("vocab", int, "tokens [8192]"), ("power", float, "of the slots of questions [0.01]"),
        ("train-examples", int, "[100000]"), ("test-examples", int, "[3000]"),
        ("batch-size", int, "[512, from length 256 on 65536 tokens]"), ("epochs", int, "[64]"),
        ("stop-at", float, "test accuracy at which a run ends [0.99]"),
        ("weight-decay", float, "[0.1]"), ("dropout", float, "of the embedding [0.1]"),
        ("num-heads", int, "[2]"), ("layers", int, "[2]"),
    ):  # fmt: skip
        own = SETTINGS["small"].get(name.replace("-", "_"))
        text = text if own is None else f"{text[:-1]}; small: {own}]"
        add(f"--{name}", type=kind, help=text)


def run(given: argparse.Namespace) -> int:
    """Train what the flags ask for; the last lines printed are the table and its path."""
    names = {f.name for f in dataclasses.fields(Sweep)}
    flags = {k: v for k, v in vars(given).items() if k in names and v is not None}
    sweep = Sweep(**{**SETTINGS[given.setting], **flags})
    output = given.output or Path("runs") / f"mqar-{given.setting}"
    text, table = train_sweep(sweep, output, given.device)
    print(text, end="")
    print(table)
    return 0


def train_sweep(sweep: Sweep, output: Path, device_name: str = "auto") -> tuple[str, Path]:
    """Train every run that `output` does not hold yet, then write table and picture.

    Each run leaves a file as it ends, and its state after every epoch before; a folder may get more
    mixers, lengths, widths, learning rates and seeds, but no other settings.

    Returns:
        The table as text, and the path of mqar.md, beside which mqar.csv, mqar.json and mqar.png
        lie.
    Raises:
        UserError: for values that cannot be, before anything is trained; a folder that is another
            sweep's, in use or cannot be written.
    """
    sweep.check()
    from filelock import FileLock, Timeout

    from metala_vision.processes import find_device

    from .mqar_run import FOUND, train_run

    device = find_device(device_name)
    mixers = _chosen(sweep.mixers)
    _check_runs(sweep, mixers)
    folder = _opened(sweep, output)
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{output}: another process is training this sweep") from None
    try:
        for torn in folder.glob(".*.*"):  # what a killed process was writing
            torn.unlink(missing_ok=True)
        found: list[dict[str, Any]] = []
        for one in _runs(sweep, mixers, found):
            path = folder / f"{one.name}.json"
            if path.exists():
                there = _read(path)
                if any(there.get(k) != v for k, v in dataclasses.asdict(one).items()):
                    raise UserError(f"{path} is of another run; delete it")
                lacking = next((k for k in FOUND if k not in there), None)
                if lacking:
                    raise UserError(f"{path} lacks {lacking}; delete it")
                found.append(there)
            else:
                start = time.monotonic()
                found.append(train_run(one, folder, device, partial(_tell, one)))
                _tell_end(one, found[-1], time.monotonic() - start)
        return write_results(found, sweep, output)
    finally:
        lock.release()


def write_results(
    found: Sequence[dict[str, Any]], sweep: "Sweep", output: Path
) -> tuple[str, Path]:
    """mqar.md, mqar.csv, mqar.json and mqar.png; the table as text and its path."""
    from .mqar_picture import recall_picture
    from .mqar_table import as_csv, as_markdown, rows_of

    rows = rows_of(found, sweep)
    text = as_markdown(rows, found, sweep)
    write_text(output / TABLE_FILE, text)
    write_text(output / CSV_FILE, as_csv(found))
    write_text(output / JSON_FILE, json.dumps(list(found), indent=1) + "\n")
    recall_picture(rows, output / PICTURE_FILE)
    return text, output / TABLE_FILE


def _runs(sweep: Sweep, mixers: list[str], found: list[dict[str, Any]]) -> Iterator["RecallRun"]:
    """The runs in their order; the seeds behind sweep_seeds at what is best in `found` by then."""
    from .mqar_table import best_rate

    first = sweep.seeds[: sweep.sweep_seeds]
    cells = [(m, n, d) for n in sweep.lengths for d in sweep.dims for m in mixers]
    for mixer, length, dim in cells:
        for rate in sweep.rates(length[0]):
            for seed in first:
                yield sweep.run(mixer, length, dim, rate, seed)
    for seed in sweep.seeds[len(first) :]:
        for mixer, length, dim in cells:
            own = [r for r in found if (r["mixer"], r["length"], r["pairs"], r["dim"])
                   == (mixer, *length, dim)]  # fmt: skip
            yield sweep.run(mixer, length, dim, best_rate(own, first), seed)


def _chosen(names: list[str]) -> list[str]:
    """The mixers asked for, or all that have a causal form."""
    from metala_vision.models import FAMILIES

    from .mqar_model import causal_mixers

    for name in names:
        if name not in FAMILIES:
            raise UserError(
                f"--mixers: {name!r} is unknown; accepted: {', '.join(FAMILIES)}"
                f"{nearest(name, list(FAMILIES))}"
            )
    reasons = causal_mixers(tuple(names) or FAMILIES)
    for name, reason in reasons.items():
        if reason and names:
            raise UserError(f"--mixers: {name} has {reason}")
        if reason:
            print(f"{name} is left out: {reason}")
    return [name for name, reason in reasons.items() if not reason]


def _check_runs(sweep: Sweep, mixers: list[str]) -> None:
    """UserError for a task, or a model of a width, that cannot be."""
    for length in sweep.lengths:
        for dim in sweep.dims:
            for mixer in mixers:
                one = sweep.run(mixer, length, dim, 1.0, 0)
                try:
                    one.task()
                    one.model("meta")
                except ValueError as error:
                    raise UserError(f"{mixer}, {told(length)}, width {dim}: {error}") from error


def _opened(sweep: Sweep, output: Path) -> Path:
    """The folder of the runs, which can be written and is of this sweep."""
    path, folder = output / SHARED_FILE, output / RUNS
    if path.exists():
        there = _read(path)
        for key, value in sweep.shared().items():
            if there.get(key) != value:
                raise UserError(
                    f"{output} holds a sweep with {key} {told(there.get(key))}, asked for is "
                    f"{told(value)}; take another --output"
                )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (output / ".lock").touch()
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    if not path.exists():
        write_text(path, json.dumps(sweep.shared(), indent=1) + "\n")
    return folder


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete it") from error
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path}: no JSON object; delete it")
    return found


def _tell(one: "RecallRun", progress: "Progress") -> None:
    """On a terminal, how far the run is; a file gets a line when it has ended."""
    if os.isatty(1):
        done = len(progress.losses)
        print(f"\r{one.name}: epoch {done} of {one.epochs}, loss {progress.losses[-1]:.3f}, "
              f"accuracy {100 * progress.accuracies[-1]:.2f} %", end="", flush=True)  # fmt: skip


def _tell_end(one: "RecallRun", found: dict[str, Any], seconds: float) -> None:
    begin = "\r\x1b[K" if os.isatty(1) else ""
    epochs = len(found["accuracies"])
    print(f"{begin}{one.name}: accuracy {100 * found['accuracy']:.2f} % after {epochs} "
          f"epoch{'s' * (epochs > 1)}, {seconds:.0f} s", flush=True)  # fmt: skip


def _length(text: str) -> tuple[int, int]:
    length, _, pairs = text.partition(":")
    if not (length.isdecimal() and pairs.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no LENGTH:PAIRS such as 64:8")
    return int(length), int(pairs)
