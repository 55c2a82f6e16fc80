"""The one command of a GPU session: shares of time, what failed, going on with what is missing."""

import argparse
import json
import re
import subprocess
import sys
import tarfile

import pytest

from metala_vision.errors import UserError
from tests.benchmarks._load import HEADER, ROOT, load

gpu, results = load("gpu"), load("results")
FILE = "tests/kernels/test_gpu.py"


# What pytest -k and -m choose, by pytest itself: of each test how many parts have it.
COLLECT = """
import json, sys
import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression

class Chosen:
    def pytest_collection_finish(self, session):
        found = {}
        for item in session.items:
            names, file = KeywordMatcher.from_item(item), item.nodeid.partition("::")[0]
            parts = [part for part, (own, word) in wanted.items() if own == file
                     and (not word or Expression.compile(word).evaluate(names))]
            found.setdefault(item.originalname, []).append(parts)
        print("\\n" + json.dumps(found))

wanted = json.loads(sys.argv[1])
files = sorted({file for file, _ in wanted.values()})
pytest.main(["--collect-only", "-qq", "-m", "gpu", *files], plugins=[Chosen()])
"""


@pytest.mark.slow
def test_every_part_of_the_tests_is_run_once():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
             if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))}  # fmt: skip
    parts = {**gpu.PARTS, **gpu.SANITIZER}
    assert {file for file, _ in parts.values()} == files - {"tests/benchmarks/test_gpu_session.py"}
    line = [sys.executable, "-c", COLLECT, json.dumps(parts)]
    said = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    found = json.loads(next(x for x in said.splitlines() if x.startswith("{")))
    assert len(found) > 10
    assert {name: parts for name, parts in found.items() if any(len(p) != 1 for p in parts)} == {}
    assert {p for parts in found.values() for [p] in parts} == set(parts)


@pytest.mark.parametrize(
    "log",
    [
        f"{FILE}::test_x[gate, key-1] PASSED                [ 10%]\n"
        f"{FILE}::test_x[half-100-half+8] FAILED    [ 20%]\n"
        f"{FILE}::test_y SKIPPED (needs a CUDA device)   [ 30%]\n",
        f"[gw0] [ 10%] PASSED {FILE}::test_x[gate, key-1] \n"
        f"[gw11] [ 20%] FAILED {FILE}::test_x[half-100-half+8] \n"
        f"[gw1] [100%] SKIPPED {FILE}::test_y \n",
    ],
    ids=["one process", "several"],
)
def test_outcomes_are_read_from_what_pytest_prints(log):
    assert gpu.outcomes(log) == {
        f"{FILE}::test_x[gate, key-1]": "PASSED",
        f"{FILE}::test_x[half-100-half+8]": "FAILED",
        f"{FILE}::test_y": "SKIPPED",
    }
    # Killed in the middle: what failed until then is known all the same.
    row = gpu.test_row("x", None, log)
    assert (row["status"], row["passed"], row["failed"], row["skipped"]) == ("stopped", 1, 1, 1)
    summary = f"FAILED {FILE}::test_x[half-100-half+8] - AssertionError: ('o', 0.3)\n"
    row = gpu.test_row("x", 1, log + summary)
    assert row["status"] == "failures"
    assert row["failures"] == [
        {"test": f"{FILE}::test_x[half-100-half+8]", "why": "AssertionError: ('o', 0.3)"}
    ]


def test_a_test_in_which_its_process_died_and_those_that_were_not_run_are_told():
    row = gpu.test_row("x", 1, f"FAILED {FILE}::test_x[a]\n")
    assert row["failures"] == [{"test": f"{FILE}::test_x[a]", "why": ""}] and row["failed"] == 1
    log = "".join(f"FAILED {FILE}::test_x[{i}] - why\n" for i in range(gpu.MOST_FAILURES))
    row = gpu.test_row("x", 2, log)
    assert row["status"] == "stopped"  # the part is not done
    assert row["failed"] == gpu.MOST_FAILURES and row["failures"][-1]["why"] == "not run"


@pytest.mark.parametrize(
    ("status", "state"),
    [(0, "ok"), (5, "ok"), (4, "failed: pytest ended with 4: 1 error in 0.2s")],
)
def test_a_pytest_that_breaks_off_is_no_success(status, state):
    assert gpu.test_row("x", status, "\n== 1 error in 0.2s ==\n\n")["status"] == state


def test_shares_are_of_what_is_left_among_those_that_wait():
    left, waiting = 3600.0, list(gpu.SHARES)
    assert gpu.allotted("tests", waiting, left) == left * gpu.SHARES["tests"] / 100
    for stage in list(waiting):
        left -= gpu.allotted(stage, waiting, left)
        waiting.remove(stage)
    assert left == pytest.approx(0)
    assert gpu.allotted("block", list(gpu.SHARES), 100.0) == 45
    assert gpu.allotted("tests", list(gpu.SHARES), 7.0) == 7


@pytest.fixture
def session(tmp_path, monkeypatch):
    """run(*stages) with made-up stages; those that were called."""
    called = []
    monkeypatch.setattr(gpu, "header", lambda what: dict(HEADER))
    monkeypatch.setattr(gpu, "limited", lambda *_: 0)
    answers = {"tests": "failures", "operators": UserError("a line"), "models": "stopped",
               "step": ValueError("a\nb")}  # fmt: skip

    def stage(session, seconds, name):
        called.append(name)
        if isinstance(answers.get(name), Exception):
            raise answers[name]
        return answers.get(name, "ok")

    monkeypatch.setattr(gpu, "stage", stage)

    def run(*only, retry=False, pack=None):
        called.clear()
        gpu.run(argparse.Namespace(out=tmp_path, minutes=5.0, only=only or tuple(gpu.SHARES),
                                   peer=[], workers=1, retry=retry, pack=pack))  # fmt: skip
        rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
        return list(called), {row["stage"]: row["status"] for row in rows}

    return run


def test_a_stage_that_fails_stops_no_other_and_a_second_call_goes_on(session, capsys):
    called, states = session()
    assert called == list(gpu.SHARES)
    assert states["tests"] == "failures" and states["operators"] == "failed: a line"
    assert states["step"] == "failed: ValueError: a b"
    assert states["models"] == "stopped" and states["block"] == "ok"
    told = capsys.readouterr().out.splitlines()
    assert sum(x.startswith("operators") and x.endswith("failed: a line") for x in told) == 1
    assert session()[0] == ["operators", "models", "step"]
    assert session(retry=True)[0] == ["tests", "operators", "models", "step"]


def test_the_folder_is_one_file_too_after_every_stage(session, tmp_path, monkeypatch):
    file, held = tmp_path.parent / "all.tar.gz", []
    archive = gpu.archive

    def noted(folder, pack):
        archive(folder, pack)
        with tarfile.open(pack) as packed:
            held.append(packed.getnames())

    monkeypatch.setattr(gpu, "archive", noted)
    session("step", "scans", pack=file)
    assert len(held) == 2 + 2 and all(f"{tmp_path.name}/gpu.json" in names for names in held)
    assert f"{tmp_path.name}/summary.txt" in held[-1]


def stage_of(tmp_path, monkeypatch, limited, **more):
    """A session whose processes are made up: limited(line, seconds, log) -> status."""
    monkeypatch.setattr(gpu, "header", lambda what: {**HEADER, "what": what})
    monkeypatch.setattr(gpu, "limited", limited)
    return gpu.Session(tmp_path, [], 2, **{"retry": False, **more})


def test_parts_of_the_tests_go_on_without_what_has_passed(tmp_path, monkeypatch):
    lines = []

    def limited(line, seconds, log, first):
        lines.append(line)
        number = len(lines)
        with log.open("a") as file:
            for name in ("test_a[1]", "test_a[1, x]", "test_b") if number == 1 else ("test_c[0]",):
                file.write(f"{FILE}::{name} PASSED [ 10%]\n")
        return None if number == 1 else 0

    session = stage_of(tmp_path, monkeypatch, limited)
    parts = {"one": (FILE, "word"), "two": (FILE, "")}
    assert gpu.tests(session, 600, parts) == "stopped"
    assert [line[line.index("-k") + 1] for line in lines] == ["word", ""]
    assert gpu.tests(session, 600, parts) == "ok"
    assert len(lines) == 3 and lines[-1][-1] == f"@{tmp_path / 'tests_one.args'}"
    # test_b would leave out test_bc with itself: it is run again.
    chosen = (tmp_path / "tests_one.args").read_text().splitlines()
    assert chosen == [f"--deselect={FILE}::{name}" for name in ("test_a[1]", "test_a[1, x]")]
    rows = json.loads((tmp_path / "tests.json").read_text())["rows"]
    assert [(row["part"], row["status"], row["passed"]) for row in rows] == [
        ("one", "ok", 4), ("two", "ok", 1),
    ]  # fmt: skip
    assert gpu.tests(session, 600, parts) == "ok" and len(lines) == 3


@pytest.mark.parametrize(
    ("ends", "rows", "state", "after"),
    [
        ([0], ["ok", "out of memory"], "ok", None),
        ([0], ["ok", "failed: x"], "failures", None),
        ([0], ["failed: x", "not run"], "stopped", None),
        (
            [None],
            ["ok", "being measured"],
            "stopped",
            ["ok", "stopped: it did not end when it was told to"],
        ),
        ([1, 0], ["ok", "ok"], "ok", None),  # behind a process that died there is another
        ([1, 1, 1], ["ok"], "failed: it is said", None),
        ([2], ["ok"], "failed: it is said", None),  # a mistake of ours is none the second time
    ],
)
def test_a_benchmark_is_as_good_as_its_rows(ends, rows, state, after, tmp_path, monkeypatch):
    lines = []

    def limited(line, seconds, log):
        lines.append(line)
        log.write_text("more\nit is said\n\n")
        results.save(tmp_path / "models.json", {**HEADER, "rows": [{"status": s} for s in rows]})
        return ends[len(lines) - 1]

    session = stage_of(tmp_path, monkeypatch, limited, retry=True)
    assert gpu.stage(session, 600, "models") == state
    assert len(lines) == len(ends)
    assert ["--retry" in line for line in lines] == [True] + [False] * (len(ends) - 1)
    found = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [row["status"] for row in found] == (after or rows)


def test_parts_that_were_never_begun_come_first(tmp_path, monkeypatch):
    chosen = []

    def limited(line, seconds, log, first):
        chosen.append(line[line.index("-k") + 1])
        log.write_text("")

    session = stage_of(tmp_path, monkeypatch, limited)
    parts = {name: (FILE, name) for name in "abcd"}
    assert gpu.tests(session, 100, {"a": parts["a"], "b": parts["b"]}) == "stopped"
    gpu.tests(session, 100, parts)
    assert chosen == ["a", "b", "c", "d", "a", "b"]


def test_an_archive_that_cannot_be_written_is_told_and_no_end(tmp_path, capsys):
    gpu.archive(tmp_path, tmp_path / "no folder" / "x.tar.gz")
    assert "--pack: cannot write" in capsys.readouterr().out


def test_what_failed_stands_in_the_summary(tmp_path):
    failed = {"form": "chunk_gla", "N": 196, "status": "failed: ImportError: x", "floor_ms": 0.1}
    results.save(tmp_path / "operators.json", {**HEADER, "rows": [failed, {"status": "ok"}]})
    test = {"part": "modes", "status": "failures", "passed": 3, "failed": 1, "skipped": 0,
            "failures": [{"test": f"{FILE}::test_x[a]", "why": "AssertionError: 0.3"}]}  # fmt: skip
    results.save(tmp_path / "tests.json", {**HEADER, "rows": [test]})
    stages = [{"stage": "tests", "seconds": 3.0, "status": "failures"}]
    text = gpu.summary(tmp_path, {**HEADER, "rows": stages})
    assert "operators, chunk_gla 196: failed: ImportError: x\n" in text
    assert "tests, modes: 3 passed, 1 failed" in text and "test_x[a]: AssertionError: 0.3" in text


def test_only_the_stages_that_are_asked_for(session):
    assert session("step", "scans")[0] == ["step", "scans"]


def test_a_folder_of_other_code_is_refused(session, monkeypatch):
    session()
    monkeypatch.setattr(gpu, "header", lambda what: {**HEADER, "sources": "other"})
    with pytest.raises(UserError, match=r"gpu\.json has sources 'def', this run 'other'"):
        session()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nix"], "--only must be among tests, .*, got 'nix'"),
        (["--workers", "0"], "--workers must be >= 1, got 0"),
        (["--minutes", "0"], "--minutes must be > 0, got 0"),
    ],
)
def test_wrong_flags_are_named(arguments, message, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", out, "--minutes", "1", *arguments])
    with pytest.raises(UserError, match=message):
        gpu.main()
