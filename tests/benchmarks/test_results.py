"""Files of results, budgets of minutes, processes with a limit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metala_vision.children import own_environment
from metala_vision.errors import UserError
from tests.benchmarks._load import BENCHMARKS, HEADER, ROOT, Clock, load

results = load("results")


def test_a_result_is_written_and_gone_on_with(tmp_path):
    path = tmp_path / "folder" / "x.json"
    result = results.begin(path, HEADER)
    assert result["rows"] == []
    results.put(result, {"a": 1, "b": 2}, ("a",))
    results.save(path, result)
    assert results.begin(path, HEADER) == {**HEADER, "rows": [{"a": 1, "b": 2}]}


@pytest.mark.parametrize("key", results.SAME)
def test_a_file_of_another_device_version_or_code_is_refused_in_one_line(tmp_path, key):
    path = tmp_path / "x.json"
    results.save(path, results.begin(path, HEADER))
    with pytest.raises(UserError, match=f"x.json has {key} .*this run 'other'") as error:
        results.begin(path, {**HEADER, key: "other"})
    assert "\n" not in str(error.value) and "another --out" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 3}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json is not"):
        results.begin(path, HEADER)


def test_a_row_takes_the_place_of_its_like():
    result = {"rows": []}
    for row in ({"a": 1, "status": "not run"}, {"a": 2, "status": "ok"}, {"a": 1, "status": "ok"}):
        results.put(result, row, ("a",))
    assert result["rows"] == [{"a": 1, "status": "ok"}, {"a": 2, "status": "ok"}]
    assert results.find(result["rows"], a=2) == {"a": 2, "status": "ok"}
    assert results.find(result["rows"], a=3) == {}


def test_what_was_being_measured_has_failed_and_what_failed_may_be_tried_again(tmp_path):
    path = tmp_path / "x.json"
    states = ["being measured", "failed: x", "stopped after 1 s", "out of memory", "ok", "not run"]
    results.save(path, {**HEADER, "rows": [{"status": state} for state in states]})

    def found(**more):
        return [row["status"] for row in results.begin(path, HEADER, **more)["rows"]]

    assert found() == ["failed: the process died", *states[1:]]
    assert found(retry=True) == ["not run"] * 3 + states[3:]


def test_a_budget_lets_start_what_its_kind_has_had_time_for():
    clock = Clock()
    budget = results.Budget(1, clock)
    assert budget.fits("slow") and budget.left() == 60
    with budget.spending("slow"):
        clock.now += 40
    assert not budget.fits("slow") and budget.fits("quick")
    clock.now += 30
    assert budget.left() == 0 and not budget.fits("quick")


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_budget_of_nothing_is_refused(minutes):
    with pytest.raises(UserError, match="--minutes must be > 0, got"):
        results.Budget(minutes)


def test_a_command_ends_by_itself_or_with_all_that_it_started(tmp_path):
    log = tmp_path / "log.txt"
    assert results.limited([sys.executable, "-c", "print('said'); exit(3)"], 20, log) == 3
    assert results.last_line(log) == "said"
    assert results.limited(["sh", "-c", "sleep 60 & echo $!; wait"], 0.5, log) is None
    child = int(results.last_line(log))
    assert any(ended(child) or time.sleep(0.1) for _ in range(50)), "what it started goes on"


def test_a_command_is_told_first_and_its_reasons_are_whole(tmp_path):
    log = tmp_path / "log.txt"
    line = ["sh", "-c", "trap 'echo told; exit' INT; echo $COLUMNS; sleep 60 & wait"]
    assert results.limited(line, 0.5, log, first=signal.SIGINT) is None
    assert log.read_text().split() == ["400", "told"]


def test_what_is_started_ends_with_its_parent_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; import results\n"
        "child = results.start(['sleep', '60'], Path(sys.argv[1]))\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    environment = {**own_environment(), "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{ROOT}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log.txt")],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    with parent:
        child = int(parent.stdout.readline())
        assert not ended(child)
        parent.kill()
    assert any(ended(child) or time.sleep(0.1) for _ in range(50))


def ended(process):
    """Whether a process is gone, or nobody has asked yet how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(results.signal, "signal", lambda *_: None)

    def main():
        raise UserError("--x must be 1,\ngot 2")

    with pytest.raises(SystemExit) as ended:
        results.command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --x must be 1, got 2\n"


def test_the_headers_of_results_say_what_a_resumed_one_must_have_in_common():
    header = load("gpu_timing").header("x")
    assert set(results.SAME) < set(header)
    assert len(header["sources"]) == 12 and header["versions"]["torch"]
    json.dumps(header)


def test_another_commit_can_be_named_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("METALA_VISION_COMMIT", "1234567")
    assert load("gpu_timing").commit() == "1234567"
