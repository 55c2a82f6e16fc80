"""The scaling command: what it computes, what it keeps, and what becomes of points that fail."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from PIL import Image

from metala_vision.cli import main
from metala_vision.scaling import ScalingConfig, scaling
from metala_vision.scaling.command import measure
from metala_vision.scaling.pictures import scaling_curves
from metala_vision.scaling.point import Point, is_full, pass_seconds
from metala_vision.scaling.table import (
    Measured,
    as_markdown,
    cells,
    exponent,
    growth_line,
    spread,
    summary,
    with_growth,
)

SMALL = ["--seconds", "0.05", "--rounds", "1"]


def rows(output):
    lines = (output / "scaling.csv").read_text().splitlines()
    return {(row["model"], int(row["size"])): row for row in csv.DictReader(lines)}


def visits(output):
    return json.loads((output / "scaling.json").read_text())


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def curve(model="a", power=1.0, sizes=(32, 64, 128), missing=(), mode="inference"):
    """A model whose time is 2 ms * tokens^power, patch 8."""
    found = []
    for size in sizes:
        tokens = (size // 8) ** 2
        row = Measured(mode, model, size, tokens, 1000)
        if size in missing:
            row.state = "out of memory"
        else:
            row.ms = 2.0 * tokens**power
            row.ms_q1, row.ms_q3, row.memory_mib = 0.9 * row.ms, 1.1 * row.ms, 0.1 * tokens
        found.append(row)
    return with_growth(found)


def test_median_and_quartiles_of_known_numbers():
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
    visits = [
        {"batch_size": 2, "passes": [0.002, 0.004], "memory_mib": 5.0, "waited": 0.0},
        {"batch_size": 2, "passes": [0.006], "memory_mib": 9.0, "waited": 0.01},
        {"batch_size": 2, "passes": [0.008, 0.010], "memory_mib": 6.0, "waited": 0.0},
    ]
    row = summary("inference", "a", 32, 10, 1000, visits)
    # All passes of a batch of two: 1, 2, 3, 4 and 5 ms an image.
    assert (row.ms_q1, row.ms, row.ms_q3) == pytest.approx((2.0, 3.0, 4.0))
    assert (row.passes, row.memory_mib, row.state) == (5, 6.0, "measured")
    assert row.images_per_s == pytest.approx(1000 / 3)
    assert row.waited == pytest.approx(0.01 / (0.03 + 0.01))
    assert row.ns_per_token == pytest.approx(300_000)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_is_the_exponent(power):
    tokens = [16, 64, 200, 4096]
    assert exponent(tokens, [3.0 * n**power for n in tokens]) == pytest.approx(power)
    measured = curve(power=power, sizes=(32, 64, 128, 256), missing=(64,))
    assert [row.growth for row in measured[:2]] == [None, None]
    # Over the size that is missing, too.
    assert [row.growth for row in measured[2:]] == pytest.approx([power, power])
    line = growth_line(measured)
    assert f"tokens^{power:.2f} from 32 to 256 px" in line
    largest = max(64 ** (power - 1), 64 ** (1 - power))
    assert line.endswith(f"largest over smallest: {largest:.2f}")


def test_a_model_that_is_measured_once_does_not_grow():
    assert growth_line(curve(missing=(64, 128))) == ""
    assert growth_line(curve(missing=(32, 64, 128))) == ""


def test_the_table_says_what_is_missing():
    failed = summary("inference", "b", 32, 16, 1000, [{"error": "no such luck"}])
    late = summary("inference", "b", 64, 64, 1000, [{"over": 7.5}])
    full = summary("inference", "b", 128, 256, 1000, [{"full": True}])
    assert [row.state for row in (failed, late, full)] == ["failed", "over 7.5 s", "out of memory"]
    assert cells(late) == ["b", "64", "64", "over 7.5 s", "-", "-", "-", "-", "-"]
    text = as_markdown([*curve(), failed, late, full], "how")
    assert "- b 32 px inference failed: no such luck" in text
    assert "| a | 64 | 64 | 128 | 115 to 141 | 7.81 | 2,000,000 | 1.00 | 6.4 |" in text


def test_a_round_that_failed_leaves_the_others():
    visits = [
        {"batch_size": 1, "passes": [0.001], "memory_mib": 1.0, "waited": 0.0},
        {"full": True},
    ]
    row = summary("inference", "b", 32, 16, 1000, visits)
    assert row.ms == pytest.approx(1.0) and row.state == "measured"
    assert "- b 32 px inference failed: out of memory, after 1 of its rounds" in as_markdown(
        [row], "how"
    )


@pytest.mark.parametrize("missing", [(), (128,), (32, 64, 128)])
@pytest.mark.parametrize("modes", [("inference",), ("inference", "train")])
def test_the_picture_is_drawn_with_points_missing(missing, modes, tmp_path):
    picture = tmp_path / "scaling.png"
    measured = [row for mode in modes for row in curve(mode=mode)]
    measured += [row for mode in modes for row in curve("b", 2.0, missing=missing, mode=mode)]
    scaling_curves(curve(missing=(32, 64, 128)), picture, None)  # nothing at all
    scaling_curves(measured, picture, (8, 8))
    with Image.open(picture) as image:
        assert image.width > 1000 and image.height > 500 * len(modes)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.png"]


def test_passes_warm_up_and_end_at_the_deadline():
    calls = []

    def step():
        calls.append(time.monotonic())
        time.sleep(0.01)

    far = time.monotonic() + 60
    passes = [wall for wall, _ in pass_seconds(step, 0.2, far, 0.01)]
    assert len(calls) > len(passes) >= 3
    assert min(passes) >= 0.01
    assert len(pass_seconds(step, 1e-6, far, 0.01)) == 3  # the fewest, without warm-up
    assert len(pass_seconds(step, 60.0, time.monotonic(), 60.0)) == 1


@pytest.mark.launch
@pytest.mark.skipif(sys.platform != "linux", reason="the scheduler's figures are Linux's")
def test_waiting_for_a_core_is_no_part_of_a_pass():
    """Two processes that compute on one core have half of it each."""
    code = (
        "import os, subprocess, sys\n"
        "from metala_vision.scaling.point import pass_seconds\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "other = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "try:\n"
        "    passes = pass_seconds(lambda: sum(range(10**7)), 0.5, float('inf'), 1.0)\n"
        "finally:\n"
        "    other.kill()\n"
        "wall, lost = (sum(x) for x in zip(*passes))\n"
        "print(lost / wall)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 0 < float(done.stdout) < 1, done.stderr


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("MemoryError: ", True),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("terminate called after throwing an instance of 'std::bad_alloc'", True),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_of_memory_are_told_from_others(text, full):
    assert is_full(text.replace("can't allocate", "can't allocate memory")) is full


@pytest.mark.launch
def test_a_measurement_from_its_flags_to_its_table(tmp_path, capsys):
    """Killed after some points and started again, it measures the others alone."""
    output = tmp_path / "out"
    flags = ["metala_nano", "resnet10t", "--sizes", "128", "64", "--mode", "inference"]
    flags = ["scaling", *flags, "--output", str(output), *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "metala_vision", *flags], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1: resnet10t 64 px inference"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = visits(output)
    assert [(v["model"], v["size"]) for v in before][:2] == [("metala_nano", 64), ("resnet10t", 64)]
    assert len(before) < 4 and (output / "scaling.md").exists()

    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert visits(output)[: len(before)] == before and len(visits(output)) == 4
    assert printed.count("round 1: ") == 4 - len(before)
    lines = printed.splitlines()
    assert lines[-1] == str(output / "scaling.md")
    assert (output / "scaling.md").read_text() in printed
    with Image.open(output / "scaling.png") as image:
        assert image.width > 500
    found = rows(output)
    assert len(found) == 4 and found["metala_nano", 64]["tokens"] == "64"
    assert found["resnet10t", 64]["tokens"] == "4"  # of stride 32
    for row in found.values():
        assert float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert float(row["images_per_s"]) == pytest.approx(1000 / float(row["ms"]))

    assert main(flags) == 0  # everything is there
    assert "round" not in capsys.readouterr().out.split("| model |")[0]
    assert main([*flags, "--batch-size", "2", "--mode", "both", "--sizes", "64"]) == 0
    with Image.open(output / "scaling.png") as image:
        assert image.height > 1000  # a row for each mode
    assert len(visits(output)) == 8  # other settings are other points; the first are kept


@pytest.mark.launch
def test_out_of_memory_is_a_cell_and_not_the_end(tmp_path, capsys):
    """For real: a limit that the process cannot pass; the smaller size is measured under it."""
    output = tmp_path / "out"
    flags = ["metala_nano", "--sizes", "32", "1024", "--mode", "train", "--memory-limit", "0.25"]
    assert main(["scaling", *flags, "--output", str(output), *SMALL]) == 0
    found = rows(output)
    assert found["metala_nano", 32]["state"] == "measured"
    assert found["metala_nano", 1024]["state"] == "out of memory"
    assert found["metala_nano", 1024]["ms"] == ""
    assert "| metala_nano | 1024 | 16,384 | out of memory | - |" in capsys.readouterr().out


@pytest.mark.launch
def test_a_point_over_its_time_is_a_cell_and_is_measured_again_with_more(tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["scaling", "metala_nano", "--sizes", "32", "--output", str(output), *SMALL]
    assert main([*flags, "--limit", "0.2"]) == 0  # less than torch needs to start
    assert "| over 0.2 s |" in capsys.readouterr().out
    assert main([*flags, "--limit", "0.2"]) == 0
    assert "round 1" not in capsys.readouterr().out
    assert main(flags) == 0
    assert rows(output)["metala_nano", 32]["state"] == "measured"


@pytest.mark.launch
@pytest.mark.slow
def test_other_failures_are_lines_below_the_table(tmp_path, capsys, monkeypatch):
    """swin cannot be made for windows that do not fit; the command says so and goes on."""
    output = tmp_path / "out"
    flags = ["swin_tiny_patch4_window7_224", "metala_nano", "--sizes", "72", "--rounds", "2"]
    monkeypatch.setattr(
        "metala_vision.scaling.command.measure",
        lambda point: {"error": "no"} if point.model == "metala_nano" else measure(point),
    )
    flags = ["scaling", *flags, "--output", str(output), "--seconds", "0.05"]
    status = main(flags)
    printed = capsys.readouterr().out
    assert status == 1 and "- metala_nano 72 px inference failed: no" in printed
    assert printed.count("metala_nano 72 px inference failed: no\n") == 2  # told, and in the table
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main(flags)  # an error is tried again
    assert rows(output)["metala_nano", 72]["state"] == "measured"


@pytest.mark.launch
def test_a_killed_process_counts_as_out_of_memory_and_others_tell_why():
    point = Point("metala_nano", 32, "inference", seconds=0.05)
    assert set(measure(point)) == {"passes", "waited", "memory_mib"}
    assert "unknown model 'nonesuch'" in measure(Point("nonesuch", 32, "inference"))["error"]


def test_what_the_system_kills_is_out_of_memory(monkeypatch):
    """As the kernel does it; the process stands for one that grew too large."""
    point = Point("metala_nano", 32, "inference", limit=5.0)
    for code, outcome in (
        ("import os; os.kill(os.getpid(), 9)", {"full": True}),
        ("import os; os.kill(os.getpid(), 14)", {"over": 5.0}),
        ("raise MemoryError", {"full": True}),
        ("raise ValueError('of two\\nlines')", {"error": "lines"}),
        ("raise SystemExit(3)", {"error": "exit status 3"}),
        ("print('warned'); print('{\"full\": true}')", {"full": True}),
    ):
        run = subprocess.run

        def stand_in(command, code=code, run=run, **options):
            return run([command[0], "-c", code], **options)

        monkeypatch.setattr("metala_vision.scaling.command.subprocess.run", stand_in)
        assert measure(point) == outcome
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["metala_tinny"], "unknown model 'metala_tinny'; did you mean metala_tiny?"),
        (["metala_nano", "--sizes", "60"],
         "--sizes needs multiples of the patch of metala_nano, 8x8 px, got 60"),
        (["metala_nano", "--sizes", "64", "4"],
         "--sizes needs multiples of the patch of metala_nano, 8x8 px, got 4"),
        (["metala_nano", "--sizes", "64", "--patch-size", "24"],
         "--sizes needs multiples of the patch, 24x24 px, got 64"),
        (["resnet18", "--patch-size", "16"], "cannot build resnet18: "),
        (["--sizes", "0"], "--sizes needs 1 or more, got 0"),
        (["--sizes", "64", "64"], "--sizes needs one or more, each once, got 64 twice"),
        (["metala_nano", "metala_nano"], "models needs one or more, each once, got metala_nano"),
        (["--batch-size", "0"], "--batch-size needs 1 or more, got 0"),
        (["--patch-size", "0"], "--patch-size needs 1 or more, got 0"),
        (["--rounds", "0"], "--rounds needs 1 or more, got 0"),
        (["--seconds", "0"], "--seconds needs a number above 0, got 0"),
        (["--seconds", "nan"], "--seconds needs a number above 0, got nan"),
        (["--limit", "-1"], "--limit needs a number above 0, got -1"),
        (["--memory-limit", "0"], "--memory-limit needs a number above 0, got 0"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16 needs a GPU; on a CPU: no, bf16"),
        (["--output", "/sys/kernel/x"], "cannot write /sys/kernel/x: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_work(flags, line, tmp_path, capsys, monkeypatch):
    measure = "metala_vision.scaling.command.measure"
    monkeypatch.setattr(measure, lambda point: pytest.fail("measured"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["scaling", *flags]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "runs" / "scaling" / "scaling.json").exists()


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_another_file_of_that_name_is_left_alone(text, tmp_path, capsys):
    (tmp_path / "scaling.json").write_text(text)
    assert main(["scaling", "metala_nano", "--output", str(tmp_path)]) == 2
    assert "is no result of this command" in capsys.readouterr().err
    assert (tmp_path / "scaling.json").read_text() == text


def test_models_take_turns_and_hopeless_points_are_not_tried_twice(tmp_path, monkeypatch):
    asked = []

    def found(point):
        asked.append((point.model, point.size))
        if point.model == "attention_nano" and point.size == 64:
            return {"full": True}
        return {"passes": [0.002], "memory_mib": 1.0, "waited": 0.0}

    monkeypatch.setattr("metala_vision.scaling.command.measure", found)
    config = ScalingConfig(["metala_nano", "attention_nano"], [64, 32], rounds=2)
    measured, _ = scaling(config, tmp_path)
    turn = [(name, size) for size in (32, 64) for name in ("metala_nano", "attention_nano")]
    assert asked == [*turn, *turn[:3]]
    states = {(row.model, row.size): row.state for row in measured}
    assert states["attention_nano", 64] == "out of memory"
    assert set(visits(tmp_path)[0]) >= set(asdict(Point("", 0, ""))) | {"round", "machine"}
    # With more memory it is tried again, and what was measured is not.
    asked.clear()
    config.memory_limit = 1.0
    scaling(config, tmp_path)
    assert asked == [("attention_nano", 64)]


@pytest.mark.launch
def test_help_needs_none_of_the_training_libraries():
    code = (
        "import sys\nfrom metala_vision.cli import main\n"
        "try:\n    main(['scaling', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'accelerate', 'matplotlib', 'metala_vision.build'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--memory-limit" in done.stdout and "metala_tiny attention_tiny" in done.stdout
