"""Whole models: order, batches that fit, peers, going on, what a dead process leaves."""

import json

import pytest
import torch
from torch import nn

from metala_vision.errors import UserError
from tests.benchmarks._load import HEADER, Clock, load

models, jobs, peers, subjects = (load(n) for n in ("models", "jobs", "peers", "subjects"))
Job = jobs.Job


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["models.py", *arguments])
    return models.parse()


def test_the_rows_of_the_goals_come_first_and_every_row_once():
    names = [subjects.OURS, subjects.DEIT, *subjects.SMALL, *subjects.COMPARATORS]
    planned = jobs.plan(names, ["theirs"], [224, 512, 1024, 2048], [True, False])
    rows = [tuple(row.values()) for job in planned for row in job.rows()]
    assert len(rows) == len(set(rows)) == 15 * 4 * 2 * 2
    assert len(planned) == 15 * (4 + 1)  # eager, one process goes through the sizes
    both = (subjects.OURS, subjects.DEIT)
    assert planned[:4] == [Job(m, (s,), True) for s in (224, 1024) for m in both]
    assert planned[4:8] == [Job(m, (s,), True) for s in (512, 2048) for m in both]
    assert planned[8:10] == [Job(m, (224, 512, 1024, 2048), False) for m in both]
    assert planned.index(Job("theirs", (224,), True)) < planned.index(Job("gla_tiny", (224,), True))


def test_a_batch_is_halved_until_it_fits():
    tried = []

    def attempt(batch, most=2):
        tried.append(batch)
        if batch > most:
            raise torch.OutOfMemoryError("full")
        return {"ms": 1.0}

    assert models.fitting(attempt, 12) == {"batch": 1, "status": "ok", "ms": 1.0}
    assert tried == [12, 6, 3, 1]
    assert models.fitting(lambda batch: attempt(batch, 0), 3) == {
        "batch": 1, "status": "out of memory",
    }  # fmt: skip


def test_a_compilers_message_counts_as_full_memory_and_other_errors_do_not():
    def broken(batch):
        raise RuntimeError("a matrix is no vector")

    assert models.is_full(RuntimeError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(RuntimeError, match="no vector"):
        models.fitting(broken, 4)


class Hungry(nn.Module):
    """Holds images up to two."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 10)

    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("full")
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("what", [subjects.TRAINING, subjects.INFERENCE])
def test_a_row_is_measured_at_the_batch_that_fits(what, monkeypatch):
    called = []
    monkeypatch.setattr(models, "step_milliseconds", lambda call: called.append(call()) or 4.0)
    [row] = [r for r in Job("hungry", (32,), False).rows() if r["what"] == what]
    row = models.measure(row, 8, Hungry)
    assert called and row["status"] == "ok" and row["batch"] == 2
    assert row["images_s"] == pytest.approx(500)  # 2 images in 4 ms
    assert row["peak_mib"] is None and row["kernels"] is None  # no GPU


def test_a_row_that_fails_says_why_and_a_mistake_of_the_user_ends_the_process(monkeypatch):
    def fails(error):
        raise error

    [row, _] = Job("x", (32,), False).rows()
    found = models.measure(row, 8, lambda: fails(ValueError("a\nb")))
    assert found == {"status": "failed: ValueError: a b"}
    with pytest.raises(UserError):
        models.measure(row, 8, lambda: fails(UserError("x")))


def test_a_training_step_trains_and_inference_does_not():
    model = Hungry()
    x = torch.randn(2, 3, 4, 4)
    before = model.linear.weight.detach().clone()
    models.inference(model, x)()
    assert torch.equal(model.linear.weight, before) and model.linear.weight.grad is None
    models.training_step(model, model, x)()
    assert not torch.equal(model.linear.weight, before)


def test_a_peer_is_a_function_of_a_file_that_finds_its_neighbours(tmp_path):
    (tmp_path / "beside_it.py").write_text("WIDTH = 7\n")
    file = tmp_path / "theirs.py"
    file.write_text(
        "import torch, beside_it\n"
        "def made(img_size): return torch.nn.Linear(img_size, beside_it.WIDTH)\n"
    )
    name, make = peers.peer(f"theirs={file}:made")
    assert name == "theirs" and make(5).weight.shape == (7, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "must be NAME=FILE.py:FUNCTION, got 'x'"),
        ("x=a.py", "must be NAME=FILE.py:FUNCTION"),
        ("x=a.py:f", "there is no file a.py"),
        ("x=FILE:g", "has no function g"),
        ("resnet18=FILE:f", "'resnet18' is the name of a model of timm"),
    ],
)
def test_a_wrong_peer_is_named(text, message, tmp_path):
    (tmp_path / "a.py").write_text("f = 3\n")
    with pytest.raises(UserError, match=message):
        peers.peer(text.replace("FILE", str(tmp_path / "a.py")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "33"], "--sizes must be multiples of 16, got 33"),
        (["--models", "nix"], "--models 'nix' is no model"),
        (["--workers", "0"], "--workers must be >= 1"),
        (["--limit", "0"], "--limit > 0"),
    ],
)
def test_wrong_flags_are_named(arguments, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        parsed(monkeypatch, "run", "--out", "x.json", *arguments)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """run(*flags) with processes that take 40 seconds of a clock; the jobs that were run."""
    clock, seen = Clock(), []
    monkeypatch.setattr(models, "header", lambda what: dict(HEADER))
    budget = models.Budget
    monkeypatch.setattr(models, "Budget", lambda minutes: budget(minutes, clock))

    def rows(self, job, seconds):
        seen.append((job.model, *job.sizes))
        clock.now += 40
        figures = {"batch": 1, "ms": 1.0, "images_s": 1.0, "peak_mib": None, "kernels": None}
        found = []
        for row in job.rows():
            state = "out of memory" if row["what"] == "training step" else "ok"
            made = {"status": "failed: x"} if row["size"] == 64 else {**figures, "status": state}
            found.append({**row, **made})
            if row["size"] == 64 and state == "ok":  # of which the process dies
                break
        return found

    monkeypatch.setattr(jobs.Runner, "rows", rows)

    def run(*flags):
        seen.clear()
        out = tmp_path / "m.json"
        models.run(parsed(monkeypatch, "run", "--out", str(out), "--eager", *flags))
        return list(seen), json.loads(out.read_text())["rows"]

    return run


def test_what_does_not_fit_into_the_minutes_is_not_run_and_done_next_time(session):
    sizes = ("--sizes", "32", "64", "96")
    seen, rows = session("--minutes", "1", *sizes)
    assert seen == [("metala_tiny", 32, 64, 96)]  # 20 s are left, and one takes 40
    first = ["out of memory", "ok", "failed: x", "failed: x"]
    assert [r["status"] for r in rows] == first + ["not run"] * 8
    seen, rows = session("--minutes", "10", *sizes)
    # Behind a size in which the process died there is a new one.
    deit = "deit_tiny_patch16_224"
    assert seen == [("metala_tiny", 96), (deit, 32, 64, 96), (deit, 96)]
    assert not any(r["status"] == "not run" for r in rows)
    assert session("--minutes", "10", *sizes)[0] == []
    seen, _ = session("--minutes", "10", "--retry", *sizes)
    assert seen == [("metala_tiny", 64), (deit, 64)]  # those that failed


def test_what_was_measured_is_kept_by_one_that_is_told_to_end(session, monkeypatch):
    rows = jobs.Runner.rows

    def told(self, job, seconds):
        self.told = SystemExit(143)
        first, second, *_ = rows(self, job, seconds)
        return [first, {**second, "status": "not run"}]

    monkeypatch.setattr(jobs.Runner, "rows", told)
    with pytest.raises(SystemExit):
        session("--sizes", "32")
    monkeypatch.setattr(jobs.Runner, "rows", rows)
    found = session("--sizes", "32")[1]
    assert [row["status"] for row in found] == ["out of memory", "ok"] * 2


def test_a_file_of_other_code_is_not_gone_on_with(session, monkeypatch):
    session("--sizes", "32")
    monkeypatch.setattr(models, "header", lambda what: {**HEADER, "sources": "zzz"})
    with pytest.raises(UserError, match="has sources 'def', this run 'zzz'"):
        session("--sizes", "32")


@pytest.mark.slow
def test_a_process_that_dies_or_is_too_slow_costs_its_rows(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(
        "import os, time, torch\n"
        "class Dies(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if not self.training: os._exit(7)\n"
        "        return super().forward(x.mean((2, 3)))\n"
        "def dies(img_size): return Dies(3, 10)\n"
        "def wrong(img_size): raise OSError('no weights')\n"
        "def slow(img_size): time.sleep(60)\n"
    )
    peers = [f"{name}={file}:{name}" for name in ("dies", "wrong", "slow")]
    runner = jobs.Runner(peers, 30, tmp_path / "logs")

    def rows(name, seconds=100, sizes=(32,)):
        return [(r["what"], r["status"]) for r in runner.rows(Job(name, sizes, False), seconds)]

    [(_, first), (_, second)] = rows("dies", sizes=(32, 64))  # what is behind it is not there
    assert first == "ok" and second.startswith("failed")
    wrong = {status for _, status in rows("wrong", sizes=(32, 64))}
    assert wrong == {"failed: OSError: no weights"}
    runner.limit = 1
    both = ("training step", "inference")
    assert rows("slow") == [(what, "stopped after 1 s") for what in both]
    assert rows("slow", 0.5) == [(what, "not run") for what in both]
    assert {path.suffix for path in (tmp_path / "logs").iterdir()} == {".txt", ".jsonl"}
    # Compiled ahead, one that dies leaves only a log.
    runner.compile_ahead([Job("dies", (32,), True)], 60)
    assert (tmp_path / "logs" / "dies_32_ahead.txt").exists()
