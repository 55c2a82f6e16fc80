"""A run that is killed and resumed is, bit by bit, the run that was not."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from metala_vision.cli import main
from metala_vision.sampling import EpochBatches, EvaluationOrder
from tests.conftest import SMALL_MODEL
from tests.train._runs import (
    assert_same_run,
    children,
    finish,
    free_port,
    kill_at,
    launch,
    metrics,
    wait_for_step,
)

# Everything that has a state of its own: workers, augmentation, mixing, accumulation, an average of
# weights, drop path. 36 images: nine batches, five steps an epoch, the last of them short.
FLAGS = (
    *SMALL_MODEL, "--batch-size", "4", "--workers", "2", "--grad-accum-steps", "2",
    "--warmup-epochs", "1", "--lr", "2e-3", "--log-interval", "1", "--model-ema",
    "--drop-path-rate", "0.3", "--mixup", "0.8", "--cutmix", "1", "--auto-augment",
    "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--checkpoint-minutes", "0.0001",
    "--checkpoint-hist", "2", "--clip-grad", "1",
)  # fmt: skip

# Groups of four tokens: what one of a single token gives does not depend on the noise.
NOISY = ("--model", "eva_attention_nano", *SMALL_MODEL[6:], "landmarks=4")

SLOW = pytest.mark.slow


def flags(tree, run_dir, epochs, *more):
    where = ["--data-dir", tree, "--run-dir", run_dir, "--epochs", epochs]
    return [*FLAGS, *where, "--resume", "auto", *more]


@pytest.mark.parametrize(
    ("processes", "kills", "epochs", "more"),
    [
        # In continuous integration a model that draws noise stands for it.
        pytest.param(1, 1, 2, (), id="one process, one kill", marks=pytest.mark.slow),
        pytest.param(1, 1, 2, NOISY, id="a model that draws noise"),
        pytest.param(2, 1, 4, (), id="two processes, one kill"),
        pytest.param(
            1,
            1,
            2,
            ("--on-device", "--auto-augment", "null", "--color-jitter", "0.3"),
            id="images on the device",
            marks=pytest.mark.slow,
        ),
        pytest.param(1, 10, 8, (), id="one process, ten kills", marks=pytest.mark.slow),
        pytest.param(2, 10, 16, (), id="two processes, ten kills", marks=pytest.mark.slow),
    ],
)
@pytest.mark.launch
def test_a_run_that_is_killed_goes_on_as_itself(
    processes, kills, epochs, more, digit_tree, tmp_path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(launch(flags(digit_tree, whole, epochs, *more), processes))
    last_step = metrics(whole)[-1]["step"]
    steps = sorted(random.Random(kills).sample(range(1, last_step), kills))
    killed = 0
    for step in steps:
        killed += kill_at(launch(flags(digit_tree, broken, epochs, *more), processes), broken, step)
    assert killed == kills
    out, _ = finish(launch(flags(digit_tree, broken, epochs, *more), processes))
    assert "resumed at step " in out
    assert_same_run(broken, whole)


def test_a_finished_run_is_resumed_to_its_end(digit_tree, tmp_path, capsys):
    run_dir = tmp_path / "run"
    first = ["train", *map(str, flags(digit_tree, run_dir, 1, "--workers", "0"))]
    assert main(first) == 0
    before, told = metrics(run_dir), capsys.readouterr().out.splitlines()[-1]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", "--resume", str(run_dir)]) == 0  # its own configuration
    assert metrics(run_dir) == before and capsys.readouterr().out.splitlines()[-1] == told
    assert (run_dir / "environment-2.json").is_file()
    AcceleratorState._reset_state(reset_partial_state=True)
    elsewhere = run_dir.rename(tmp_path / "elsewhere")
    assert main(["train", "--resume", f"{elsewhere}/"]) == 0
    assert metrics(elsewhere) == before


def test_killed_before_its_first_checkpoint_a_run_begins_anew(digit_tree, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    late = ("--checkpoint-minutes", "60", "--workers", "0")
    assert main(["train", *map(str, flags(digit_tree, whole, 1, *late))]) == 0
    shutil.copytree(whole, broken, symlinks=True)
    for name in ("checkpoints", "last", "best"):
        path = broken / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (broken / "checkpoints" / "step-00000003.new").mkdir(parents=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", *map(str, flags(digit_tree, broken, 1, *late))]) == 0
    assert_same_run(broken, whole)


def test_the_newest_the_best_and_no_more_are_kept(digit_tree, tmp_path):
    run_dir = tmp_path / "run"
    more = ("--workers", "0", "--checkpoint-hist", "1")
    assert main(["train", *map(str, flags(digit_tree, run_dir, 4, *more))]) == 0
    left = sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").iterdir())
    evals = [x for x in metrics(run_dir) if x["event"] == "eval"]
    best = max(evals, key=lambda x: (x["top1"], -x["step"]))["step"]
    assert set(left) == {19, 20, best}
    assert (run_dir / "best").resolve().name == f"step-{best:08d}"
    assert (run_dir / "last").resolve().name == "step-00000020"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
@pytest.mark.launch
def test_a_signal_saves_and_ends_with_its_status(number, digit_tree, tmp_path):
    run_dir = tmp_path / "run"
    run = launch(flags(digit_tree, run_dir, 500, "--checkpoint-minutes", "60"))
    wait_for_step(run, run_dir, 3)
    run.send_signal(number)
    _, err = finish(run, status=128 + number)
    step = int((run_dir / "last").resolve().name[5:])
    line = f"stopped by {number.name}, saved at step {step}; go on with --resume {run_dir}"
    assert err.strip().splitlines()[-1] == f"train_imagenet.py: {line}"
    state = torch.load(run_dir / "last" / "training_state.pt", weights_only=True)
    assert state["step"] == step == metrics(run_dir)[-1]["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=SLOW)])
@pytest.mark.launch
def test_a_signal_under_torchrun_saves_one_step_of_all(number, digit_tree, tmp_path):
    """SIGTERM to torchrun, which passes it on; SIGUSR1, which it does not know, to one of two."""
    run_dir = tmp_path / "run"
    run = launch(flags(digit_tree, run_dir, 500, "--checkpoint-minutes", "60"), processes=2)
    wait_for_step(run, run_dir, 3)
    os.kill(run.pid if number == signal.SIGTERM else max(children(run.pid)), number)
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0 and err.count(f"stopped by {number.name}, saved at step") == 1, err
    state = torch.load(run_dir / "last" / "training_state.pt", weights_only=True)
    assert len(state["processes"]) == 2
    first, second = (own["rng"]["torch"] for own in state["processes"])
    assert not first.equal(second)  # of one step: each has drawn its own
    assert state["step"] == metrics(run_dir)[-1]["step"]


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_are_one_with_twice_the_batch(digit_tree, tmp_path):
    """Losses over 50 steps; batches of 12 mixed as one."""
    losses = []
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        given = [
            *SMALL_MODEL, "--batch-size", 12 // processes, "--workers", "1", "--epochs", "17",
            "--max-steps", "50", "--warmup-epochs", "5", "--lr", "1e-3", "--log-interval", "1",
            "--mixup", "0.8", "--cutmix", "1", "--auto-augment", "rand-m9-mstd0.5-inc1",
            "--eval-interval", "17", "--data-dir", digit_tree, "--run-dir", run_dir,
        ]  # fmt: skip
        finish(launch(given, processes))
        losses.append([x["loss"] for x in metrics(run_dir) if x["event"] == "train"])
    assert len(losses[0]) == 50
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.launch
def test_two_nodes_run_one_job(digit_tree, tmp_path):
    """Two agents on this machine, one process each, are two processes under one agent."""
    expected, run_dir = tmp_path / "expected", tmp_path / "nodes"
    finish(launch(flags(digit_tree, expected, 2), processes=2))
    port = str(free_port())
    agents = []
    for rank in (0, 1):
        node = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", "--master-port")
        agents.append(launch(flags(digit_tree, run_dir, 2), nodes=(*node, port)))
    for agent in agents:
        finish(agent)
    assert_same_run(run_dir, expected)


@pytest.mark.launch
def test_accelerate_launch_starts_it_too(digit_tree, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "--cpu", "--num_processes", "1", "train_imagenet.py"]
    run_dir = tmp_path / "run"
    given = [*command, *map(str, flags(digit_tree, run_dir, 1, "--workers", "0"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(given, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics(run_dir)[-1]["event"] == "eval"


# The order of samples, without a process


@pytest.mark.parametrize(("images", "batch", "world"), [(100, 4, 3), (41, 8, 2), (9, 16, 4)])
def test_processes_share_the_places_of_one(images, batch, world):
    one = EpochBatches(images, batch * world, seed=3)
    parts = [EpochBatches(images, batch, 3, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in parts} == {len(one)}
    for number, whole in enumerate(one):
        own = [list(part)[number] for part in parts]
        assert len({len(x) for x in own}) == 1
        together = sorted(key.place for x in own for key in x)
        usable = len(whole) - len(whole) % world
        assert together == [key.place for key in whole][:usable]
        count = len(own[0])
        if count % 2 == 0:  # mixing pairs an image with its mirror image in the batch
            ends = 2 * min(together) + usable - 1
            for x in own:
                assert all(x[i].place + x[count - 1 - i].place == ends for i in range(count))


def test_an_epoch_goes_on_at_any_batch():
    batches = EpochBatches(50, 6, seed=1, repeats=3)
    batches.set_epoch(4)
    whole = list(batches)
    for first in range(len(whole)):
        batches.set_epoch(4, first)
        assert list(batches) == whole[first:]
    assert len(batches) == len(whole)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_image_is_evaluated_once(world):
    parts = [list(EvaluationOrder(1003, rank, world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = sorted(x for x in itertools.chain(*parts) if x < 1003)
    assert seen == list(range(1003))


def test_free_settings_may_change_and_no_other(digit_tree, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["train", *map(str, flags(digit_tree, run_dir, 1, "--workers", "0"))]) == 0
    before = metrics(run_dir)
    for more, line in (
        (["--lr", "1e-3"], f"optim.lr is 0.001, the run in {run_dir} has 0.002"),
        (["--seed", "1"], f"run.seed is 1, the run in {run_dir} has 0"),
        (["--data-dir", "/"], "/ needs train/"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(["train", *map(str, flags(digit_tree, run_dir, 1)), *more]) == 2
        assert line in capsys.readouterr().err
        assert metrics(run_dir) == before
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ("--workers", "1", "--checkpoint-minutes", "7", "--max-skipped", "3")
    assert main(["train", *map(str, flags(digit_tree, run_dir, 1, *more))]) == 0
    assert metrics(run_dir) == before
    assert json.loads((run_dir / "environment-2.json").read_text())["command"]
