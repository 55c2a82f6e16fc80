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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metala_vision.errors import UserError
from metala_vision.files import write_text

# What two parts of one result must have in common.
SAME = ("what", "device", "versions", "commit", "sources")
OK, NOT_RUN, OUT_OF_MEMORY = "ok", "not run", "out of memory"
DIED = "failed: the process died"  # written before a row is measured


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


def begin(path: Path, header: dict) -> dict:
    """A new result, or the one that is at `path`, to go on with.

    Raises:
        UserError: if that one is of another device, commit or version.
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
    return result


def put(result: dict, row: dict, keys: Sequence[str]) -> None:
    """The row in place of one with the same values of `keys`, or at the end."""
    for i, old in enumerate(result["rows"]):
        if all(old.get(key) == row.get(key) for key in keys):
            result["rows"][i] = row
            return
    result["rows"].append(row)


def one(rows: list[dict], **values: object) -> dict:
    """The row with these values that was measured, or {}."""
    return next(
        (
            row
            for row in rows
            if row.get("status", OK) == OK and all(row.get(k) == v for k, v in values.items())
        ),
        {},
    )


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


def limited(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Exit status of a command whose output goes to `log`; None if it had to be stopped.

    The command is a group of processes of its own, which ends with it: by SIGTERM, and five seconds
    later by SIGKILL.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what it said before it was stopped
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=unbuffered
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """The process, which leads a group of its own, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        os.killpg(process.pid, signal.SIGKILL)  # also what outlived it
    process.wait()


def last_line(log: Path) -> str:
    """The last line with text of a log: of a traceback, what went wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")[:300]


def run_and_show(doc: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of a script that measures and shows, and that of its `run`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("run", help="measure")
    measured.add_argument(
        "--out", type=Path, required=True, help="the JSON file to write or to go on with"
    )
    view = commands.add_parser("show", help="a table of a file, and a plot")
    view.add_argument("file", type=Path)
    view.add_argument("--plot", type=Path, help="the PNG file to write")
    return parser, measured


def shown(
    arguments: argparse.Namespace, show: Callable[[dict], None],
    plot: Callable[[dict, Path], object],
) -> bool:  # fmt: skip
    """Whether a file was to be shown, which is done then."""
    if arguments.command != "show":
        return False
    result = read(arguments.file)
    show(result)
    if arguments.plot:
        plot(result, arguments.plot)
    return True


def command(main: Callable[[], None]) -> None:
    """Runs main: a UserError is one line and status 2; SIGTERM ends it, and what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        sys.exit(2)
