"""The bench command: that its figures are those of what it says it measures."""

import json
import time

import pytest
import torch
from accelerate.state import AcceleratorState

from metala_vision.bench import images_per_second
from metala_vision.cli import main
from tests.conftest import SMALL_MODEL


def test_the_clock_counts_images_and_not_the_warm_up():
    calls = []

    def batch():
        calls.append(time.perf_counter())
        time.sleep(0.2 if len(calls) <= 2 else 0.01)
        return 5

    rate = images_per_second(batch, 0.2, lambda: None)
    # The two slow calls of the warm-up would make it 5 x calls / (0.4 + 0.2) at most.
    assert rate <= 5 / 0.01 and rate == pytest.approx(5 * (len(calls) - 2) / 0.2, rel=0.3)


@pytest.mark.parametrize(
    "more", [[], ["--workers", "1", "--mixup", "0.8", "--model-ema"], ["--on-device"]]
)
def test_bench_measures_a_configuration(more, digit_tree, tmp_path, capsys):
    out = tmp_path / "speed.json"
    given = ["--data-dir", str(digit_tree), "--batch-size", "12", *SMALL_MODEL, *more]
    workers = [] if "--workers" in more else ["--workers", "0"]
    status = main(["bench", *given, *workers, "--seconds", "0.3", "--json", str(out)])
    assert status == 0
    speed = json.loads(out.read_text())
    assert speed["batch_size"] == 12 and speed["model"] == "metala_nano"
    assert min(speed[k] for k in ("loader", "step", "run", "evaluation")) > 1
    assert speed["gpu_busy"] is None or torch.cuda.is_available()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"a run: {speed['run']:.1f} images a second, bound by the ")
    assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--seconds", "0"], "--seconds needs a number above 0, got 0.0"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json: No such folder"),
        (["--lrr", "1"], "unknown argument '--lrr'; did you mean --lr?"),
        (["--data-dir", "/nowhere"], "data folder /nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line(flags, line, capsys):
    assert main(["bench", *flags]) == 2
    assert capsys.readouterr().err == f"metala-vision: error: {line}\n"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_help_lists_the_flags_of_training_too(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert "--seconds" in out and "--grad-accum-steps" in out
