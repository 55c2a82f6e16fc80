"""Runs of a comparison as processes: on devices of their own, stopped, killed, begun again."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from metala_vision.children import own_environment
from metala_vision.cli import main
from metala_vision.compare.sweep import Sweep
from metala_vision.errors import Stopped, UserError
from tests.train._comparison import comparison, table
from tests.train._runs import children

pytestmark = pytest.mark.launch


def script(monkeypatch, tmp_path, text):
    """What stands for `python -m metala_vision COMMAND FLAGS` in these tests of the sweep alone."""
    path = tmp_path / "stub.sh"
    path.write_text(f"#!/bin/sh\nshift 2\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_runs_on_two_devices_run_at_once_each_with_its_own(monkeypatch, tmp_path):
    """Each waits for the other: one after the other they would wait for ever."""
    script(
        monkeypatch, tmp_path,
        f'cd {tmp_path}; touch "begun-$1"; echo "$CUDA_VISIBLE_DEVICES"\n'
        'while [ ! -e begun-a ] || [ ! -e begun-b ]; do sleep 0.05; done',
    )  # fmt: skip
    with Sweep(["4", "7"]) as sweep:
        jobs = [partial(sweep.run, name, [], tmp_path / f"{name}.txt") for name in "ab"]
        assert sorted(sweep.each(jobs)) == [(0, None), (1, None)]
    assert {(tmp_path / f"{name}.txt").read_text() for name in "ab"} == {"4\n", "7\n"}


@pytest.mark.parametrize(
    ("devices", "given", "found"),
    [([None], None, ""), ([None] * 3, None, "2"), ([None] * 9, None, "1"), ([None] * 3, "5", "5")],
)
def test_runs_at_a_time_share_the_cores(devices, given, found, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    script(monkeypatch, tmp_path, 'echo "$OMP_NUM_THREADS"')
    with Sweep(devices) as sweep:
        assert sweep.run("x", [], tmp_path / "log.txt") is None
    assert (tmp_path / "log.txt").read_text() == f"{found}\n"


def test_a_device_runs_one_at_a_time(monkeypatch, tmp_path):
    script(
        monkeypatch, tmp_path,
        f'cd {tmp_path}; mkdir busy-$CUDA_VISIBLE_DEVICES || exit 1\n'
        'sleep 0.1; rmdir busy-$CUDA_VISIBLE_DEVICES',
    )  # fmt: skip
    with Sweep(["0", "1"]) as sweep:
        jobs = [partial(sweep.run, "x", [], tmp_path / f"{i}.txt") for i in range(8)]
        assert sorted(sweep.each(jobs)) == [(i, None) for i in range(8)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo first >&2; echo last >&2; exit 3", "last"),
        ("exit 4", "exit status 4"),
        ("printf '\\377\\n' >&2; exit 1", "\ufffd"),
        ("echo a warning >&2; kill -9 $$", "ended by SIGKILL, as where memory is short"),
    ],
)
def test_a_failure_is_its_last_line(text, told, monkeypatch, tmp_path):
    script(monkeypatch, tmp_path, text)
    with Sweep() as sweep:
        assert sweep.run("x", [], tmp_path / "log.txt") == told


def test_ctrl_c_in_a_run_ends_the_sweep(monkeypatch, tmp_path):
    script(monkeypatch, tmp_path, "exit 130")
    with Sweep(["0", "1"]) as sweep, pytest.raises(KeyboardInterrupt):
        list(sweep.each([partial(sweep.run, "x", [], tmp_path / "log.txt")]))


@pytest.mark.parametrize("how", ["ctrl-c", "error"])
def test_what_runs_is_asked_to_end_where_another_ends_the_sweep(how, monkeypatch, tmp_path):
    """A run of an hour: the sweep is over when it has saved, not when it is through."""
    script(
        monkeypatch, tmp_path,
        f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM\n"
        f"touch {tmp_path}/running; sleep 3600 & wait",
    )  # fmt: skip

    def other():
        wait_until((tmp_path / "running").exists)
        raise KeyboardInterrupt if how == "ctrl-c" else UserError("no")

    start = time.monotonic()
    with Sweep(["0", "1"]) as sweep, pytest.raises((KeyboardInterrupt, UserError)):
        list(sweep.each([partial(sweep.run, "x", [], tmp_path / "a.txt"), other]))
    assert time.monotonic() - start < 600 and (tmp_path / "saved").exists()


def test_a_signal_that_a_run_outlives_ends_the_sweep_too(monkeypatch, tmp_path):
    script(monkeypatch, tmp_path, "trap '' TERM; kill -TERM $PPID; sleep 0.2; exit 0")
    with Sweep() as sweep, pytest.raises(Stopped):
        sweep.run("x", [], tmp_path / "log.txt")


def test_runs_find_the_package_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = "import metala_vision; print(metala_vision.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=own_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    line = r"cannot write .*/none/log\.txt: No such"
    with Sweep() as sweep, pytest.raises(UserError, match=line):
        sweep.run("x", [], tmp_path / "none" / "log.txt")


def test_a_signal_is_passed_on_and_handlers_come_back(monkeypatch, tmp_path):
    script(monkeypatch, tmp_path, "kill -TERM $PPID; sleep 30 & wait; exit 0")
    before = signal.getsignal(signal.SIGTERM)
    with Sweep() as sweep, pytest.raises(Stopped, match="stopped by SIGTERM; the same command"):
        sweep.run("x", [], tmp_path / "log.txt")
    assert signal.getsignal(signal.SIGTERM) is before


def begin(file, output):
    told = [sys.executable, "-m", "metala_vision", "compare", str(file), "--seconds", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*told, "--output", str(output)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(digit_tree, tmp_path_factory):
    """The file of a comparison of two members, and a folder where it ran to its end."""
    folder = tmp_path_factory.mktemp("whole")
    changes = {"optim": {"epochs": 4, "warmup_epochs": 0}, "run": {"log_interval": 1}}
    file = comparison(folder, digit_tree, seeds=[0], more=changes)
    assert main(["compare", str(file), "--output", str(folder / "out"), "--seconds", "0"]) == 0
    return file, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_killed_and_begun_again_ends_the_same(number, whole, tmp_path):
    """In the second run; its process ends too and leaves the folder free."""
    file, expected = whole
    killed = tmp_path / "killed"
    process = begin(file, killed)
    metrics = killed / "attention_nano-0" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"train"' in metrics.read_text())
    run = list(children(process.pid))
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert stderr.splitlines()[-1].endswith("stopped by SIGTERM; the same command goes on")
    assert run and not (killed / "attention_nano-0" / "result.json").exists()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in run), 30)

    assert main(["compare", str(file), "--output", str(killed), "--seconds", "0"]) == 0
    assert table(killed) == table(expected)


def test_gpus_that_are_not_there_are_refused(digit_tree, tmp_path, capsys, monkeypatch):
    file = comparison(tmp_path, digit_tree)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for gpus, line in (
        ("2", "--gpus: no GPU '2', 2 can be used"),
        ("a", "--gpus: no GPU 'a', 2 can be used"),
        ("0,", "--gpus: no GPU '', 2 can be used"),
        ("1,1", "--gpus: GPU 1 is given twice"),
    ):
        assert main(["compare", str(file), "--gpus", gpus]) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "expected"), [([], [None]), (["--jobs", "2"], [None] * 2),
                            (["--jobs", "2", "--gpus", "0,1"], ["0", "1", "0", "1"])],
)  # fmt: skip
def test_several_runs_at_a_time_on_each_device(
    flags, expected, digit_tree, tmp_path, monkeypatch, capsys
):
    def stop(comparison, output, seconds, devices, title):
        raise UserError(f"on {devices}")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("metala_vision.compare.compare", stop)
    assert main(["compare", str(comparison(tmp_path, digit_tree)), *flags]) == 2
    assert capsys.readouterr().err == f"metala-vision: error: on {expected}\n"
    assert main(["compare", "compare/quickstart", "--jobs", "0"]) == 2
    assert capsys.readouterr().err == "metala-vision: error: --jobs needs 1 or more, got 0\n"
