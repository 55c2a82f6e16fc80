"""Operators: saved memory, rows that cannot be measured, going on behind a process that died."""

import argparse
import json

import pytest
import torch

from metala_vision.errors import UserError
from tests.benchmarks._load import HEADER, load

operators, results = load("operators"), load("results")
MIB = 2**20 // 4  # floats


def test_saved_memory_is_inputs_and_what_else_autograd_keeps_each_storage_once():
    x, w = (torch.randn(MIB, requires_grad=True) for _ in range(2))
    # A product keeps both; of exp the result is kept; a view is no memory of its own.
    assert operators.saved_mebibytes(lambda: x * w, [x, w]) == 2
    assert operators.saved_mebibytes(lambda: x.exp(), [x]) == 2
    assert operators.saved_mebibytes(lambda: x.exp().sin().cos(), [x]) == 3
    assert operators.saved_mebibytes(lambda: x.view(2, -1)[0] * w[: MIB // 2], [x, w]) == 2
    assert operators.saved_mebibytes(lambda: x + w, [x, w]) == 2


def test_the_portable_form_keeps_more_than_its_inputs():
    row = operators.measure("chunked", 64, 1, 1, True)
    inputs = 64 * (32 + 32 + 64) * 4 / 2**20
    assert row["status"] == "ok" and row["saved_mib"] > inputs and row["ms"] > 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("full"), "out of memory"),
        (ValueError("a\nb"), "failed: ValueError: a b"),
    ],
)
def test_a_form_that_fails_is_a_row_that_says_so(error, status, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr(operators, "forms", lambda *x: {"ours": (fails, list(x))})
    assert operators.measure("ours", 8, 1, 1, True) == {"status": status}


class Died(BaseException):
    """A process that is gone: nothing catches it."""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """run(), the calls of measure, and what the first of them raise."""
    calls, ends, out = [], [], tmp_path / "k.json"
    monkeypatch.setattr(operators, "header", lambda what: dict(HEADER))
    monkeypatch.setattr(operators, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(operators, "available", lambda: ["ours", "sdpa"])

    def measure(name, N, B, H, backward):
        calls.append((name, N, backward))
        if len(calls) <= len(ends):
            raise ends[len(calls) - 1]
        return {"status": "ok", "ms": 1.0, "gpu_ms": None, "peak_mib": None, "saved_mib": None}

    monkeypatch.setattr(operators, "measure", measure)

    def run(retry=False):
        operators.run(argparse.Namespace(out=out, minutes=1.0, lengths=[196], retry=retry))
        return json.loads(out.read_text())["rows"]

    return run, calls, ends


def test_rows_are_gone_on_with_behind_one_in_which_the_process_died(session):
    run, calls, ends = session
    ends.append(Died())
    with pytest.raises(Died):
        run()
    rows = run()
    assert [r["status"] for r in rows] == ["failed: the process died", "ok", "ok", "ok"]
    assert rows[0]["floor_ms"] == pytest.approx(1e-6 * rows[0]["bytes"])
    run()
    assert len(calls) == 4
    rows = run(retry=True)
    assert [r["status"] for r in rows] == ["ok"] * 4 and calls[0] == calls[4] and len(calls) == 5


def test_a_row_that_was_stopped_from_outside_is_run_again(session):
    run, calls, ends = session
    ends.append(SystemExit(143))
    with pytest.raises(SystemExit):
        run()
    assert [r["status"] for r in run()] == ["ok"] * 4
    assert calls[0] == calls[1] and len(calls) == 5


def test_a_row_that_is_always_stopped_does_not_keep_the_others_from_running(session):
    run, _, ends = session
    ends += [SystemExit(143)] * 2
    for _ in ends:
        with pytest.raises(SystemExit):
            run()
    assert [r["status"] for r in run()] == ["stopped twice", "ok", "ok", "ok"]
    assert [r["status"] for r in run(retry=True)] == ["ok"] * 4


def test_a_length_that_is_not_measured_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["operators.py", "run", "--out", "x", "--lengths", "7"])
    with pytest.raises(UserError, match=r"--lengths must be among \[.*196.*\], got 7"):
        operators.main()
