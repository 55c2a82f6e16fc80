"""The JSON file of a benchmark, written after every row, and the time and processes it may take.

A file holds what it was measured on (`gpu_timing.header`) and `rows`; a run that finds its file
there goes on with the rows that are missing. Nothing here needs torch.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from metala_vision.children import ending_with_parent, own_environment
from metala_vision.errors import UserError
from metala_vision.files import check_outputs, check_picture, write_text

# What two parts of one result must have in common; `sources` tells what a commit changed of it.
SAME = ("what", "device", "versions", "sources")
OK, NOT_RUN, OUT_OF_MEMORY, FAILED = "ok", "not run", "out of memory", "failed"
TWICE = "stopped twice"  # what is longer than the time that it is given
MEASURING = "being measured"  # what a process leaves that dies meanwhile
DIED = f"{FAILED}: the process died"


def read(path: Path) -> dict:
    """A result's file.

    Raises:
        UserError: where it cannot be read, or holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("rows", []), list):
        raise UserError(f"{path} is not a result of a benchmark: it has no rows")
    return result


def save(path: Path, result: dict) -> None:
    """The whole file or, on an error, the one that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=2) + "\n")


def begin(path: Path, header: dict, retry: bool = False) -> dict:
    """A new result, or the one that is at `path`, to go on with.

    Args:
        retry: whether what failed or was stopped counts as not run.
    Raises:
        UserError: if that one is of another device, version or code.
    """
    if not path.exists():
        return {**header, "rows": []}
    result = read(path)
    for key in SAME:
        if result.get(key) != header.get(key):
            raise UserError(
                f"{path} has {key} {result.get(key)!r}, this run {header.get(key)!r}: "
                "choose another --out, or remove the file"
            )
    settled(result, DIED)
    for row in result["rows"]:
        if retry and row.get("status", OK).startswith((FAILED, "stopped")):
            row |= {"status": NOT_RUN, "tried": False}
    return result


def settled(result: dict, status: str) -> dict:
    """The result with this status of the row that was being measured as its process ended."""
    for row in result["rows"]:
        if row.get("status") == MEASURING:
            row["status"] = status
    return result


def put(result: dict, row: dict, keys: Sequence[str]) -> None:
    """The row in place of one with the same values of `keys`, or at the end."""
    for i, old in enumerate(result["rows"]):
        if all(old.get(key) == row.get(key) for key in keys):
            result["rows"][i] = row
            return
    result["rows"].append(row)


def find(rows: list[dict], **values: object) -> dict:
    """The row with these values, or {}."""
    return next((row for row in rows if all(row.get(k) == v for k, v in values.items())), {})


class Budget:
    """Minutes that a run may take.

    A piece of work fits while more time is left than the longest of its kind has taken; the first
    of a kind fits while anything is left.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not minutes > 0:
            raise UserError(f"--minutes must be > 0, got {minutes}")
        self.clock = clock
        self.end = clock() + 60 * minutes
        self.longest: dict[str, float] = {}

    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self.end - self.clock())

    def fits(self, kind: str) -> bool:
        return self.left() > self.longest.get(kind, 0.0)

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Remembers how long a piece of this kind took."""
        start = self.clock()
        try:
            yield
        finally:
            self.longest[kind] = max(self.longest.get(kind, 0.0), self.clock() - start)


def stopped(before: dict | None) -> dict:
    """What a row that is stopped has beside its keys: it is measured again, but not for ever.

    Args:
        before: the row as it was, if it was there.
    """
    again = before is None or not before.get("tried")
    return {"status": NOT_RUN if again else TWICE, "tried": True}


def measure_rows(
    path: Path,
    result: dict,
    wanted: Iterable[tuple[dict, str, Callable[[], dict]]],
    keys: Sequence[str],
    budget: "Budget",
) -> None:
    """Every row that is not in the result yet, saved before and after it is measured.

    Args:
        wanted: what a row begins with, its kind for the budget, and a call that gives the rest,
            `status` among it.
    """
    for row, kind, measure in wanted:
        old = next((r for r in result["rows"] if all(r[key] == row[key] for key in keys)), None)
        if old is not None and old["status"] != NOT_RUN:
            continue
        # The first of a kind compiles and tunes itself, which says nothing of the next.
        if kind in budget.longest:
            kind += ", tuned"
        if not budget.fits(kind):
            put(result, {**row, "status": NOT_RUN}, keys)
            continue
        put(result, {**row, "status": MEASURING}, keys)
        save(path, result)
        status = DIED
        try:
            with budget.spending(kind):
                row = {**row, **measure()}
            status = row["status"]
        except (SystemExit, KeyboardInterrupt):  # stopped from outside
            row |= stopped(old)
            status = row["status"]
            raise
        finally:
            put(result, {**row, "status": status}, keys)
            save(path, result)
    save(path, result)


def limited(
    command: Sequence[str], seconds: float, log: Path, first: int = signal.SIGTERM
) -> int | None:
    """Exit status of a command whose output goes to `log`; None if it had to be stopped."""
    process = start(command, log)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process, first)


def start(command: Sequence[str], log: Path) -> subprocess.Popen:
    """The command as the first of a group of processes; what it says is added to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # What it said before it was stopped; pytest's reasons, whole.
    environment = {**own_environment(), "PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment, preexec_fn=ending_with_parent(signal.SIGKILL),
        )  # fmt: skip


def end_group(process: subprocess.Popen, first: int = signal.SIGTERM, grace: float = 15) -> None:
    """The process, which leads a group of its own, and what it started.

    By the signal `first`, which it may take so many seconds to heed, and then by SIGKILL.
    """
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, first)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        os.killpg(process.pid, signal.SIGKILL)  # also what outlived it
    process.wait()


def last_line(log: Path) -> str:
    """The last line with text of a log: of a traceback, what went wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")[:300]


def run_and_show(
    doc: str | None, picture: bool = True
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of a script that measures and shows, and that of its `run`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("run", help="measure")
    measured.add_argument(
        "--out", type=Path, required=True, help="the JSON file to write or to go on with"
    )
    measured.add_argument("--minutes", type=float, default=1e4, help="to take at most")
    measured.add_argument("--retry", action="store_true", help="also what failed or was stopped")
    view = commands.add_parser("show", help="a table of a file, and a picture where it has one")
    view.add_argument("file", type=Path)
    if picture:
        view.add_argument("--plot", type=Path, help="the PNG file to write")
    return parser, measured


def shown(
    arguments: argparse.Namespace, show: Callable[[dict], None],
    plot: Callable[[dict, Path], object] | None = None,
) -> bool:  # fmt: skip
    """Whether a file was to be shown, which is done then."""
    if arguments.command != "show":
        with contextlib.suppress(OSError):  # told by what follows
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
        check_outputs({"--out": arguments.out})
        return False
    path = None if plot is None else arguments.plot
    check_picture("--plot", path)
    check_outputs({"--plot": path}, [(arguments.file, "the file to show")])
    result = read(arguments.file)
    show(result)
    if plot is not None and path is not None:
        plot(result, path)
    return True


def command(main: Callable[[], None]) -> None:
    """Runs main: a UserError is one line and status 2; SIGTERM ends it, and what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        sys.exit(2)
