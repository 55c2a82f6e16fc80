"""FSDP2 on two processes of a CPU: the losses of DDP, checkpoints that timm loads, exact resume."""

import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

import metala_vision  # noqa: F401  (registers the models)
from tests.conftest import SMALL_MODEL
from tests.train._runs import ROOT, assert_same_run, finish, launch, metrics

pytestmark = [pytest.mark.slow, pytest.mark.launch]
SCRIPT = ROOT / "tests" / "train" / "_fsdp.py"


def flags(tree, run_dir, *more):
    return [
        *SMALL_MODEL, "--batch-size", "6", "--workers", "0", "--epochs", "4", "--lr", "1e-3",
        "--log-interval", "1", "--clip-grad", "1", "--data-dir", tree, "--run-dir", run_dir,
        "--resume", "auto", *more,
    ]  # fmt: skip


def test_fsdp2_trains_as_ddp_and_resumes(digit_tree, tmp_path):
    finish(launch(flags(digit_tree, tmp_path / "ddp"), processes=2))
    sharded = tmp_path / "fsdp"
    finish(launch(flags(digit_tree, sharded), processes=2, script=SCRIPT))
    for ours, theirs in zip(metrics(sharded), metrics(tmp_path / "ddp"), strict=True):
        assert ours["event"] == theirs["event"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    model = timm.create_model(f"local-dir:{sharded / 'last'}", pretrained=True).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    weights = load_file(sharded / "last" / "model.safetensors")
    assert all(model.state_dict()[name].equal(x) for name, x in weights.items())

    broken = shutil.copytree(sharded, tmp_path / "broken", symlinks=True)
    shutil.rmtree(broken / "checkpoints" / "step-00000012")
    out, _ = finish(launch(flags(digit_tree, broken), processes=2, script=SCRIPT))
    assert "resumed at step 9 of 12" in out
    assert_same_run(broken, sharded)


def test_an_average_of_the_weights_is_refused(digit_tree, tmp_path):
    process = launch(flags(digit_tree, tmp_path / "x", "--model-ema"), processes=2, script=SCRIPT)
    _, err = process.communicate(timeout=200)
    assert process.returncode
    assert err.count("error: optim.model_ema is not supported with FSDP; DDP takes it") == 1
