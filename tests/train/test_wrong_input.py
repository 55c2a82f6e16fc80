"""What a hurried user gets wrong: one clear line, a non-zero status, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metala_vision.cli import main
from metala_vision.config import Config
from metala_vision.errors import UserError
from metala_vision.run_folder import RunFolder
from tests.conftest import SMALL_MODEL
from tests.train._runs import metrics

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
    line = run(capsys, "--data-dir", own_digit_tree)
    assert line.endswith("val has class 'seven', which the training images lack")


def test_a_class_folder_without_an_image(capsys, own_digit_tree):
    (own_digit_tree / "train" / "digit3").mkdir()
    line = run(capsys, "--data-dir", own_digit_tree)
    assert line.startswith(f"no image in class folder {own_digit_tree / 'train' / 'digit3'}; end")


def test_images_without_class_folders(capsys, own_digit_tree):
    line = run(capsys, "--data-dir", own_digit_tree / "train" / "digit0", "--val-fraction", "0.1")
    assert line == f"{own_digit_tree / 'train' / 'digit0'} has no class folders"


def test_split_folders_are_no_classes(capsys, own_digit_tree):
    (own_digit_tree / "train").rename(own_digit_tree / "Train")
    line = run(capsys, "--data-dir", own_digit_tree, "--val-fraction", "0.1")
    assert line.startswith(f"{own_digit_tree} holds ") and "which is no class" in line


def test_a_full_disk_under_the_metrics_is_one_line(tmp_path):
    folder = RunFolder(Config.model_validate({"run": {"run_dir": tmp_path / "run"}}), "x")
    folder.close()
    folder.metrics = open("/dev/full", "wb")  # noqa: SIM115  (closed by the folder)
    with pytest.raises(UserError, match="No space left on device"):
        folder.log("train", step=1)
    folder.close()


def test_a_folder_for_the_digits(capsys, digit_tree):
    line = run(capsys, "--dataset", "digits", "--data-dir", digit_tree)
    assert line.startswith(f"data.dataset='digits' takes no data folder, got {digit_tree}")


def test_a_class_too_small_to_hold_out_from(capsys, own_digit_tree):
    folder = own_digit_tree / "train"
    for image in sorted((folder / "digit1").iterdir())[1:]:
        image.unlink()
    line = run(capsys, "--data-dir", folder, "--val-fraction", "0.1")
    assert line == f"cannot hold out 0.1 of each class of {folder}: class 'digit1' has one image"


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
        (["--in-chans", "4"], "model.in_chans='4' does not fit: 1 (grey) and 3 (colour)"),
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
        (["--model-kwargs", "num_classes=2"], "model.model_kwargs takes no num_classes=2"),
        (["--model", "metala_nano", "--model-kwargs", "mlp_ratio=-1"], "cannot build metala_nano"),
        (
            ["--model", "metala_nano", "--model-kwargs", "checkpoint_path=/nowhere.pth"],
            "model.model_kwargs takes no checkpoint_path='/nowhere.pth'",
        ),
        (["--model", "deit_tiny_patch16_224", "--model-kwargs", "num_heads=0"], "cannot build"),
        (["--min-lr", "1"], "optim.min_lr=1.0 exceeds the peak learning rate"),
        (["--opt", "adahessian"], "optim.opt='adahessian' needs second derivatives"),
    ],
)
def test_unfit_settings(capsys, digit_tree, tmp_path, flags, message):
    assert message in run(capsys, "--data-dir", digit_tree, *flags, "--output", tmp_path)
    assert not list(tmp_path.iterdir()), "a run folder was left behind"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    capsys, digit_tree, tmp_path
):
    """lr * weight_decay = 10 multiplies every weight by -9 a step: finite at first, then not."""
    run_dir = tmp_path / "run"
    line = run(
        capsys, "--data-dir", digit_tree, "--run-dir", run_dir, "--epochs", "20",
        "--warmup-epochs", "0", "--lr", "0.1", "--weight-decay", "100", "--log-interval", "1",
        "--eval-interval", "20", "--checkpoint-minutes", "0.00001",
    )  # fmt: skip
    assert "11 steps in a row, more than run.max_skipped=10; a lower lr" in line
    assert "its images: " in line and line.count(".png, ") == 3
    skipped = [x for x in metrics(run_dir) if x["event"] == "skipped"]
    assert [x["in_a_row"] for x in skipped[-11:]] == list(range(1, 12))
    assert all(len(x["images"]) == 12 for x in skipped)
    kept = torch.load(run_dir / "last" / "training_state.pt", weights_only=True)["step"]
    assert kept >= 3 and line.endswith(f"the checkpoint of step {kept} is kept in {run_dir}/last")
    weights = load_file(run_dir / "last" / "model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_an_evaluation_that_is_not_finite_stops_the_run(capsys, digit_tree, tmp_path):
    run_dir = tmp_path / "run"
    line = run(
        capsys, "--data-dir", digit_tree, "--run-dir", run_dir, "--epochs", "20",
        "--warmup-epochs", "0", "--lr", "0.1", "--weight-decay", "100",
    )  # fmt: skip
    assert line.startswith("the loss of the evaluation is nan; the checkpoint of step ")


def test_a_last_step_that_breaks_the_weights_is_noticed_before_saving(capsys, digit_tree, tmp_path):
    """The loss of the only interval is still finite; the update after it is not."""
    run_dir = tmp_path / "run"
    line = run(
        capsys, "--data-dir", digit_tree, "--run-dir", run_dir, "--max-steps", "1",
        "--warmup-epochs", "0", "--opt", "sgd", "--lr", "1e11", "--weight-decay", "1e30",
    )  # fmt: skip
    assert line == "weights became infinite or nan by step 1"
    assert not (run_dir / "last").exists()


def test_a_share_of_unreadable_images_is_accepted_and_reported(own_digit_tree, tmp_path):
    for bad in ("train/digit2/03.png", "val/digit1/13.png"):
        (own_digit_tree / bad).write_bytes(b"no picture")
    run_dir = tmp_path / "run"
    flags = ["--data-dir", str(own_digit_tree), "--run-dir", str(run_dir), *SMALL_MODEL,
             "--epochs", "2", "--batch-size", "12", "--workers", "0"]  # fmt: skip
    assert main(["train", *flags, "--max-unreadable", "0.1"]) == 0
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    named = [x["image"] for x in lines if x["event"] == "unreadable"]
    assert len(named) == 2 and all(x.startswith("cannot read image ") for x in named)
    assert {x["unreadable"] for x in lines if x["event"] == "eval"} == {1}


RECIPE_MISTAKES = [
    (
        ["--mixup", "0.8", "--batch-size", "9"],
        "mixup and cutmix take batches in pairs, a",
    ),
    (
        ["--distill-teacher", "deit_tinny"],
        "unknown teacher optim.distill_teacher='deit_tinny'; d",
    ),
    (
        ["--distill-teacher", "metala_nano", "--distill-kwargs", "pretrained=false"],
        "the teacher metala_nano knows 200 classes, the student 3",
    ),
    (["--distill-teacher", "local-dir:nowhere"], "cannot build the teacher local-dir:nowhere: "),
    (
        ["--torchcompile", "blocks", "--model", "resnet10t", "--img-size", "64"],
        "model.torchcompile='blocks': resnet10t has no blocks; take 'model'",
    ),
    (["--opt-kwargs", "momentums=1"], "cannot make optimizer 'adamw': "),
    (["--cutmix-minmax", "0.5", "0.5"], "data.cutmix_minmax"),
    (["--opt-kwargs", "eps"], "--opt-kwargs takes key=value, got 'eps'"),
    (["--sched", "cosign"], "optim.sched='cosign' does not fit: "),
    (["--layer-decay", "1.5"], "optim.layer_decay='1.5' does not fit: "),
]


@pytest.mark.parametrize(("flags", "message"), RECIPE_MISTAKES, ids=lambda x: str(x)[:40])
def test_a_mistake_in_the_recipe(capsys, digit_tree, tmp_path, flags, message):
    run_dir = tmp_path / "run"
    line = run(capsys, "--data-dir", digit_tree, "--run-dir", run_dir, *flags)
    assert line.startswith(message) and not run_dir.exists()


def test_an_unreadable_held_out_image_does_not_cost_the_epoch(capsys, own_digit_tree, tmp_path):
    bad = own_digit_tree / "val" / "digit1" / "13.png"
    bad.write_bytes(b"no picture")
    run_dir = tmp_path / "run"
    line = run(capsys, "--data-dir", own_digit_tree, "--run-dir", run_dir, "--epochs", "1")
    assert line.startswith(f"cannot read image {bad}: ")
    assert line.endswith(f"the checkpoint of step 3 is kept in {run_dir}/last")
    assert (run_dir / "last" / "model.safetensors").exists()


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


def test_a_run_folder_that_holds_anything_is_left_alone(capsys, digit_tree, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    line = run(capsys, "--data-dir", digit_tree, "--run-dir", tmp_path)
    assert line == f"{tmp_path} is not empty, it holds metrics.jsonl; name a new --run-dir"
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


@pytest.mark.launch
def test_the_script_exits_with_the_status():
    script = [sys.executable, str(ROOT / "train_imagenet.py"), "--data-dir", "/nowhere"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "train_imagenet.py: error: data folder /nowhere does not exist\n"


@pytest.mark.launch
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
