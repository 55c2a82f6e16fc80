"""One command for a session on a GPU: tests, sanitizer, and every benchmark, within minutes.

    python benchmarks/gpu.py --out DIR --minutes M [--only STAGE ...] [--retry] [--pack FILE.tar.gz]
        [--peer NAME=FILE.py:FUNCTION]

The stages, in this order, each with its share of the time that is left:

tests      pytest -m gpu in parts, in several processes (tests.json: names of what failed)
sanitizer  compute-sanitizer on the forward and backward kernels (tests.json)
operators, models, step, scans, block   the benchmarks of these names

A stage that fails or is stopped does not keep the others from running. All that is made lies in
DIR: JSON, a log for each stage (STAGE.txt), pictures, and summary.txt, which is printed last. A
second call with the same DIR goes on with what is missing, with --retry also with what failed.
--pack keeps DIR as one archive too, made anew after every stage: for a machine that may be taken
away. Where the checkout is without git, METALA_VISION_COMMIT names the commit. Without a GPU the
tests are skipped, each by its own mark, and the benchmarks run at their small sizes, to show that
it works.
"""

import argparse
import importlib.util
import os
import re
import signal
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from gpu_timing import GPU, ROOT, failure, header, headline
from results import (
    FAILED,
    NOT_RUN,
    OK,
    Budget,
    begin,
    command,
    last_line,
    limited,
    put,
    read,
    save,
    settled,
)

from metala_vision.errors import UserError
from metala_vision.files import check_outputs, replacing, write_text

# Stages and their shares; the tests are most of what has to be known.
SHARES = {"tests": 30, "sanitizer": 14, "operators": 13, "models": 28, "step": 8, "scans": 4,
          "block": 3}  # fmt: skip
LARGE = ("test_the_error_rule", "test_every_mode", "test_the_gated_norm",
         "test_the_depthwise_convolution", "test_the_linear_recurrence",
         "test_the_selective_scan")  # fmt: skip
REST = " and ".join(f"not {name}" for name in (*LARGE, "sanitizer"))
KERNELS, TRAINING = "tests/kernels/test_gpu.py", "tests/train/test_gpu.py"
# Of each part the file, and the word of pytest -k.
PARTS = {
    "others": (KERNELS, REST),
    **{name.removeprefix("test_"): (KERNELS, name) for name in LARGE},
    "training": (TRAINING, ""),
}
SANITIZER = {tool: (KERNELS, f"sanitizer and {tool}") for tool in ("memcheck", "racecheck")}
MOST_FAILURES = 40  # of a part, which ends there
FAILURES, STOPPED = "failures", "stopped"  # all were run, or not
HERE = Path(__file__).resolve().parent


class Session(NamedTuple):
    """What a stage needs to know."""

    out: Path
    peers: list[str]
    workers: int
    retry: bool


def outcomes(log: str) -> dict[str, str]:
    """{test: PASSED, FAILED, ERROR or SKIPPED} of pytest -v, of one process or of xdist's."""
    found = {}
    words = "(PASSED|FAILED|ERROR|SKIPPED)"
    for line in log.splitlines():
        if match := re.match(rf"\[gw\d+\] \[ *\d+%\] {words} (.+?) *$", line):
            found[match[2]] = match[1]
        elif match := re.match(rf"(\S+\.py::.+?) {words}(?: .*)? *(?:\[ *\d+%\])?$", line):
            found[match[1]] = match[2]
    return found


def reasons(log: str) -> dict[str, str]:
    """{test: one line} of pytest's summary of what failed."""
    found = re.finditer(r"^(?:FAILED|ERROR) (\S+\.py::.*?)(?: - (.*))?$", log, re.M)
    return {match[1]: (match[2] or "")[:200] for match in found}


def test_row(part: str, status: int | None, log: str) -> dict:
    """What became of a part of the tests."""
    found = outcomes(log)
    why = reasons(log)
    names = [name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    names += [name for name in why if name not in found]  # in which a process died
    counts = {
        word: sum(outcome == word.upper() for outcome in found.values())
        for word in ("passed", "skipped")
    }
    if status is None or len(names) >= MOST_FAILURES:
        state = STOPPED
    elif names or status == 1:
        state = FAILURES
    else:
        said = next((line for line in reversed(log.splitlines()) if line.strip()), "no output")
        end = f"{FAILED}: pytest ended with {status}: {said.strip(' =')[:200]}"
        state = OK if status in (0, 5) else end
    failures = [{"test": name, "why": why.get(name, "")} for name in names]
    if len(failures) >= MOST_FAILURES:
        failures.append({"test": "the tests behind these", "why": NOT_RUN})
    return {"part": part, "status": state, **counts, "failed": len(names), "failures": failures}


def pytest_line(session: Session, part: str, file: str, word: str, before: str) -> list[str]:
    """pytest over a part, without those that have passed by the log `before`."""
    # Warnings of another machine's versions are no failures of ours.
    line = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-W", "default"]
    line += ["-p", "no:cacheprovider", "--maxfail", str(MOST_FAILURES), file, "-k", word]
    if session.workers > 1 and part not in SANITIZER and importlib.util.find_spec("xdist"):
        line += ["-n", str(session.workers), "--dist", "worksteal"]
    # pytest leaves out what begins so: the name of a test may begin that of another, unless it ends
    # with its parameters.
    passed = [
        name
        for name, state in outcomes(before).items()
        if state in ("PASSED", "SKIPPED") and name.endswith("]")
    ]
    if passed:
        chosen = session.out / f"tests_{part}.args"
        write_text(chosen, "".join(f"--deselect={name}\n" for name in passed))
        line += [f"@{chosen}"]
    return line


def tests(session: Session, seconds: float, parts: dict[str, tuple[str, str]]) -> str:
    """pytest's parts that have not run to their end yet, within these seconds."""
    path = session.out / "tests.json"
    result = begin(path, header("tests"))
    budget = Budget(seconds / 60)
    ended = (OK,) if session.retry else (OK, FAILURES)
    done = {row["part"] for row in result["rows"] if row["status"] in ended}
    begun = {row["part"] for row in result["rows"]}
    waiting = sorted((part for part in parts if part not in done), key=begun.__contains__)
    for i, part in enumerate(waiting):
        # A minute at least: every part first imports and collects, in every process.
        share = min(budget.left(), max(60.0, budget.left() / (len(waiting) - i)))
        if share < 1:
            break
        log = session.out / f"tests_{part}.txt"
        before = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        # By SIGINT pytest ends with its summary of what failed until then.
        line = pytest_line(session, part, *parts[part], before)
        status = limited(line, share, log, first=signal.SIGINT)
        text = log.read_text(encoding="utf-8", errors="replace")
        put(result, test_row(part, status, text), ("part",))
        save(path, result)
    states = {row["part"]: row["status"] for row in result["rows"]}
    told = [states.get(part, STOPPED) for part in parts]
    whole = FAILURES if FAILURES in told else OK
    return next((state for state in told if state not in (OK, FAILURES)), whole)


def benchmark(session: Session, seconds: float, name: str) -> str:
    """A script of this folder; where its process died it is called again, for the rows behind."""
    out, log = session.out / f"{name}.json", session.out / f"{name}.txt"
    budget = Budget(seconds / 60)
    line = [sys.executable, str(HERE / f"{name}.py")]
    line += ["--out", str(out)] if name == "block" else ["run", "--out", str(out)]
    if name == "models":
        line += [flag for text in session.peers for flag in ("--peer", text)]
    if name == "step" and not GPU:
        line += ["--no-compile"]  # minutes
    status, retry = None, session.retry and name != "block"
    for _ in range(3 if name in ("operators", "models", "scans") else 1):
        more = ["--retry"] if retry else []
        if name in ("operators", "models", "scans"):  # they stop by themselves, a little before
            more += ["--minutes", f"{max(0.05, (0.95 * budget.left() - 20) / 60):.3f}"]
        status = limited([*line, *more], budget.left(), log)
        if status in (None, 0, 2) or budget.left() < 10:
            break
        retry = False  # not what the process has just died of
    result = read(out) if out.exists() else {"rows": []}
    if status is None:
        if out.exists():  # a row that was being measured then did not heed the signal
            save(out, settled(result, f"{STOPPED}: it did not end when it was told to"))
        return STOPPED
    if status:
        return f"{FAILED}: {last_line(log)}"
    states = [row.get("status", OK) for row in result["rows"]]
    if NOT_RUN in states:
        return STOPPED
    return FAILURES if failures(result) else OK


def failures(result: dict) -> list[dict]:
    """Rows that were not measured for another reason than time or memory."""
    return [r for r in result["rows"] if r.get("status", OK).startswith((FAILED, STOPPED))]


def stage(session: Session, seconds: float, name: str) -> str:
    """Runs it; what became of it."""
    if name in ("tests", "sanitizer"):
        return tests(session, seconds, PARTS if name == "tests" else SANITIZER)
    return benchmark(session, seconds, name)


def allotted(stage: str, waiting: list[str], left: float) -> float:
    """Seconds of a stage: its share among those that wait, of what is left, and 45 at least."""
    share = left * SHARES[stage] / sum(SHARES[name] for name in waiting)
    return min(left, max(45.0, share))


def run(arguments: argparse.Namespace) -> None:
    budget = Budget(arguments.minutes)
    out, pack = arguments.out, arguments.pack
    session = Session(out, arguments.peer, arguments.workers, arguments.retry)
    path = out / "gpu.json"
    result = begin(path, header("gpu"))
    ended = (OK,) if arguments.retry else (OK, FAILURES)
    done = {row["stage"] for row in result["rows"] if row["status"] in ended}
    waiting = [name for name in SHARES if name in arguments.only and name not in done]
    end = 30 if GPU else 5  # seconds for the pictures and the summary
    while waiting:
        name = waiting[0]
        seconds = allotted(name, waiting, max(0.0, budget.left() - end))
        before = budget.left()
        try:
            status = stage(session, seconds, name) if seconds > 1 else NOT_RUN
        except UserError as error:
            status = f"{FAILED}: {error.line}"
        except Exception as error:  # ours: the stages behind it know nothing of it
            status = failure(error)
        row = {"stage": name, "status": status, "seconds": round(before - budget.left(), 1)}
        put(result, row, ("stage",))
        save(path, result)
        print(f"{name}: {status}, {row['seconds']} s", flush=True)
        waiting.pop(0)
        archive(out, pack)
    write_text(out / "summary.txt", summary(out, result))
    archive(out, pack)
    log = out / "report.txt"
    log.unlink(missing_ok=True)
    line = [sys.executable, str(HERE / "report.py"), "--results", str(out)]
    limited([*line, "--docs", str(out), "--print"], max(5.0, budget.left()), log)
    text = summary(out, result)
    write_text(out / "summary.txt", text)
    archive(out, pack)
    print(text)


def archive(folder: Path, file: Path | None) -> None:
    """The folder as one file, whole or as it was; the session goes on without."""
    if file is None:
        return
    try:
        with replacing(file) as fresh, tarfile.open(fresh, "w:gz") as packed:
            packed.add(folder, folder.name)
    except (UserError, OSError, tarfile.TarError) as error:
        print(f"--pack: {error}", flush=True)


def summary(out: Path, result: dict) -> str:
    """What has to be known of a session: short enough to come back as a command's output."""
    lines = [headline(result)]
    lines += [f"{r['stage']:10} {r['seconds']:7} s  {r['status']}" for r in result["rows"]]
    logs = [out / "report.txt", out / "step.txt"]
    report, step = (
        log.read_text(encoding="utf-8", errors="replace") if log.exists() else "" for log in logs
    )
    lines += ["", report[:6000], step[-1500:]]
    if (out / "tests.json").exists():
        for row in read(out / "tests.json")["rows"]:
            lines.append(f"tests, {row['part']}: {row['passed']} passed, {row['failed']} failed, "
                         f"{row['skipped']} skipped, {row['status']}")  # fmt: skip
            for failed in row["failures"][:6]:
                lines.append(f"  {failed['test'].split('::')[-1]}: {failed['why'][:100]}")
    for name in ("operators", "models", "scans", "step"):
        if (out / f"{name}.json").exists():
            for row in failures(read(out / f"{name}.json"))[:12]:
                what = [str(row[key]) for key in row if key not in ("status", "bytes", "floor_ms")]
                lines.append(f"{name}, {' '.join(what)}: {row['status'][:150]}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, required=True, help="to take at most")
    parser.add_argument("--only", nargs="+", default=list(SHARES), metavar="STAGE")
    parser.add_argument("--retry", action="store_true", help="also what failed or was stopped")
    parser.add_argument("--pack", type=Path, metavar="FILE.tar.gz", help="DIR as one file too")
    parser.add_argument("--peer", action="append", default=[], help="of models.py")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=max(1, min(8, cores // 2)),
                        help="processes of the tests")  # fmt: skip
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.only if name not in SHARES]:
        raise UserError(f"--only must be among {', '.join(SHARES)}, got {unknown[0]!r}")
    if arguments.workers < 1:
        raise UserError(f"--workers must be >= 1, got {arguments.workers}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is no folder")
    arguments.out = arguments.out.resolve()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out {arguments.out}: {error.strerror}") from error
    if arguments.pack:
        arguments.pack = arguments.pack.resolve()
        if arguments.out in arguments.pack.parents:
            raise UserError(f"--pack {arguments.pack} lies in --out, which it is to hold")
    check_outputs({"--pack": arguments.pack})
    os.chdir(ROOT)
    run(arguments)


if __name__ == "__main__":
    command(main)
