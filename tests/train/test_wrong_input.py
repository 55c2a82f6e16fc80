"""What a hurried user gets wrong: one clear line, a non-zero status, nothing lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from metala_vision.cli import main
from tests.conftest import SMALL_MODEL

ROOT = Path(__file__).parents[2]


def run(capsys, *flags):
    """Status and the one line of an in-process run with a small model."""
    model = () if "--model" in flags else SMALL_MODEL
    status = main(["train", *model, "--workers", "0", "--batch-size", "12", *map(str, flags)])
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("metala-vision: error: ")]
    assert status == 2 and len(errors) == 1 and lines[-1] == errors[0], lines
    assert not any("Traceback" in line for line in lines)
    return errors[0].removeprefix("metala-vision: error: ")


def test_no_data_folder_named(capsys, monkeypatch):
    monkeypatch.delenv("METALA_VISION_DATA", raising=False)
    assert run(capsys) == "no data folder: give --data-dir DIR or set METALA_VISION_DATA"


def test_missing_folder(capsys, tmp_path):
    missing = tmp_path / "nowhere"
    assert run(capsys, "--data-dir", missing) == f"data folder {missing} does not exist"


def test_a_file_for_a_folder(capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert run(capsys, "--data-dir", file) == f"data folder {file} is not a folder"


def test_empty_folder(capsys, tmp_path):
    line = run(capsys, "--data-dir", tmp_path)
    assert line.startswith(
        f"{tmp_path} needs train/ and val/ with one folder per class, found noth"
    )


def test_folders_without_images(capsys, own_digit_tree):
    for image in (own_digit_tree / "train").rglob("*.png"):
        image.unlink()
    line = run(capsys, "--data-dir", own_digit_tree)
    assert line.startswith(f"no images in the class folders of {own_digit_tree / 'train'}")


def test_no_held_out_images(capsys, own_digit_tree):
    shutil.rmtree(own_digit_tree / "val")
    assert "found train; to hold out part of one tree" in run(capsys, "--data-dir", own_digit_tree)


def test_one_class(capsys, own_digit_tree):
    for name in ("digit1", "digit2"):
        shutil.rmtree(own_digit_tree / "train" / name)
    line = run(capsys, "--data-dir", own_digit_tree)
    assert line.endswith("has one class, 'digit0'; at least two class folders are needed")


def test_a_class_that_only_val_has(capsys, own_digit_tree):
    (own_digit_tree / "val" / "digit1").rename(own_digit_tree / "val" / "seven")
    assert "has class 'seven', which" in run(capsys, "--data-dir", own_digit_tree)


def test_a_class_too_small_to_hold_out_from(capsys, own_digit_tree):
    folder = own_digit_tree / "train"
    for image in sorted((folder / "digit1").iterdir())[1:]:
        image.unlink()
    line = run(capsys, "--data-dir", folder, "--val-fraction", "0.1")
    assert line.startswith(f"cannot hold out 0.1 of each class of {folder}: ")


def test_val_fraction_beside_val(capsys, digit_tree):
    line = run(capsys, "--data-dir", digit_tree, "--val-fraction", "0.1")
    assert line == f"val_fraction=0.1 was given, but {digit_tree / 'val'} exists; drop one"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image(capsys, own_digit_tree, tmp_path, workers):
    bad = own_digit_tree / "train" / "digit2" / "03.png"
    bad.write_bytes(b"no picture")
    run_dir = tmp_path / "run"
    line = run(capsys, "--data-dir", own_digit_tree, "--run-dir", run_dir, "--workers", workers)
    assert line.startswith(f"cannot read image {bad}: cannot identify image file")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--in-chans", "4"], "model.in_chans=4 does not fit: Input should be 1 or 3"),
        (["--mean", "0.5", "0.5"], "data.mean has 2 values; 1 or in_chans=3 are accepted"),
        (["--img-size", "4"], "img_size=4 must be a multiple of patch_size=8"),
        (["--img-size", "30"], "img_size=30 must be a multiple of patch_size=8"),
        (["--model", "metala_tinny"], "unknown model 'metala_tinny'; did you mean metala_tiny?"),
        (["--model", "metala_nano", "--model-kwargs", "flavour=1"], "unexpected keyword argument"),
        (["--num-classes", "2"], "model.num_classes=2, but the data has 3 classes"),
        (["--opt", "adamww"], "unknown optimizer optim.opt='adamww'; did you mean adamw?"),
        (["--mixed-precision", "fp16"], "run.mixed_precision='fp16' needs a GPU"),
        (["--lrr", "1"], "unknown argument '--lrr'; did you mean --lr?"),
        (["--auto-augment", "nonsense"], "auto_augment='nonsense'"),
    ],
)
def test_unfit_settings(capsys, digit_tree, tmp_path, flags, message):
    assert message in run(capsys, "--data-dir", digit_tree, *flags, "--output", tmp_path)
    assert not list(tmp_path.iterdir()), "a run folder was left behind"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    capsys, digit_tree, tmp_path
):
    """lr * weight_decay = 100 multiplies every weight by -99 a step: finite at first, then not."""
    run_dir = tmp_path / "run"
    line = run(
        capsys, "--data-dir", digit_tree, "--run-dir", run_dir, "--epochs", "20",
        "--warmup-epochs", "0", "--lr", "1", "--weight-decay", "100", "--log-interval", "1",
    )  # fmt: skip
    assert line.startswith("the loss became ") and "between steps" in line
    kept = torch.load(run_dir / "last" / "training_state.pt", weights_only=True)["step"]
    assert kept >= 3 and line.endswith(f"the checkpoint of step {kept} is kept in {run_dir}/last")


def test_a_folder_that_cannot_be_written(capsys, digit_tree, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    line = run(capsys, "--data-dir", digit_tree, "--output", blocker)
    assert line.startswith(f"cannot write the run folder {blocker}") and "Not a directory" in line


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that refuses everyone")
def test_no_write_permission_even_for_root(capsys, digit_tree):
    line = run(capsys, "--data-dir", digit_tree, "--run-dir", "/sys/kernel/metala")
    assert line.startswith("cannot write the run folder /sys/kernel/metala: ")
    assert "permitted" in line or "denied" in line.lower()


def test_a_run_folder_that_holds_a_run_is_left_alone(capsys, digit_tree, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    line = run(capsys, "--data-dir", digit_tree, "--run-dir", tmp_path)
    assert line == f"{tmp_path} holds a run already; name another --run-dir"
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_the_script_exits_with_the_status():
    script = [sys.executable, str(ROOT / "train_imagenet.py"), "--data-dir", "/nowhere"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "train_imagenet.py: error: data folder /nowhere does not exist\n"


def test_ctrl_c_says_so(digit_tree, tmp_path):
    script = [
        sys.executable, str(ROOT / "train_imagenet.py"), "--data-dir", str(digit_tree),
        "--run-dir", str(tmp_path / "run"), *SMALL_MODEL, "--workers", "0", "--epochs", "100000",
        "--eval-interval", "50",
    ]  # fmt: skip
    process = subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("train_imagenet.py: interrupted")
    assert (tmp_path / "run" / "last" / "model.safetensors").exists()
