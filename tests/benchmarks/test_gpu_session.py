"""The one command of a GPU session: shares of time, what failed, going on with what is missing."""

import argparse
import json

import pytest

from metala_vision.errors import UserError
from tests.benchmarks._load import HEADER, load

gpu = load("gpu")
FILE = "tests/kernels/test_gpu.py"


def test_every_part_of_the_tests_is_run_once():
    """pytest -k takes a name that contains the word; every file with tests for a GPU has a part."""
    files = {path.relative_to(gpu.ROOT).as_posix() for path in (gpu.ROOT / "tests").rglob("*.py")
             if "pytest.mark.gpu,\n" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert {file for file, _ in gpu.PARTS.values()} == files
    assert [word for file, word in gpu.PARTS.values() if file == gpu.TRAINING] == [""]
    names = [*gpu.LARGE, "test_tf32", "test_the_sanitizer_finds_nothing[memcheck]"]
    rest = [part.removeprefix("not ") for part in gpu.REST.split(" and ")]
    for name in names:
        kernels = {part: word for part, (file, word) in gpu.PARTS.items() if file == gpu.KERNELS}
        chosen = [part for part, word in kernels.items() if part != "others" and word in name]
        others = not any(word in name for word in rest)
        sanitizer = "sanitizer" in name
        assert len(chosen) + others + sanitizer == 1, name


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
    assert row["failed"] == gpu.MOST_FAILURES and row["failures"][-1]["why"] == "not run"


@pytest.mark.parametrize(
    ("status", "state"), [(0, "ok"), (5, "ok"), (4, "failed: pytest ended with 4")]
)
def test_a_pytest_that_breaks_off_is_no_success(status, state):
    assert gpu.test_row("x", status, "")["status"] == state


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
    answers = {"tests": "failures", "kernels": UserError("a line"), "models": "stopped"}

    def stage(name):
        def call(session, seconds):
            called.append(name)
            if isinstance(answers.get(name), UserError):
                raise answers[name]
            return answers.get(name, "ok")

        return call

    monkeypatch.setattr(gpu, "STAGES", {name: stage(name) for name in gpu.SHARES})

    def run(*only):
        called.clear()
        gpu.run(argparse.Namespace(out=tmp_path, minutes=5.0, only=only or tuple(gpu.SHARES),
                                   peer=[], workers=1))  # fmt: skip
        rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
        return list(called), {row["stage"]: row["status"] for row in rows}

    return run


def test_a_stage_that_fails_stops_no_other_and_a_second_call_goes_on(session, capsys):
    called, states = session()
    assert called == list(gpu.SHARES)
    assert states["tests"] == "failures" and states["kernels"] == "failed: a line"
    assert states["models"] == "stopped" and states["block"] == "ok"
    told = capsys.readouterr().out.splitlines()
    assert sum(x.startswith("kernels") and x.endswith("failed: a line") for x in told) == 1
    assert session()[0] == ["kernels", "models"]


def test_only_the_stages_that_are_asked_for(session):
    assert session("step", "scans")[0] == ["step", "scans"]


def test_a_folder_of_another_commit_is_refused(session, monkeypatch):
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
