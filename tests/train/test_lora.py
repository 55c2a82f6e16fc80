"""LoRA: what is trained, merged, published and resumed."""

import shutil
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import metala_vision
from metala_vision.cli import main
from metala_vision.config import DataConfig, ModelConfig
from metala_vision.data import create_loaders
from metala_vision.errors import UserError
from metala_vision.evaluate import load_model
from metala_vision.models import FAMILIES
from metala_vision.run_folder import read_metrics
from metala_vision.transfer import (
    choose_trained,
    hidden_kernels,
    lora_scale,
    merged,
)
from tests.train._runs import assert_same_run, finish, launch
from tests.train._transfer import NANO, run_train, shipped, small


def lora(family="metala", **given):
    """A model with adapters that do something, and its scale."""
    model, config = small(family, lora_rank=4, **given)
    choose_trained(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), lora_scale(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_its_parameters_and_merges_to_the_same_outputs(family):
    plain, _ = small(family)
    model, scale = lora(family, lora_alpha=8.0)
    assert scale == 2
    images = torch.randn(4, 3, 32, 32)
    out = model(images)
    out.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("head.fc.") for name in trained)
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)} - {"head.fc"}
    assert {n.split(".lora_")[0] for n in trained if ".lora_" in n} == linear
    state = merged(model.state_dict(), scale)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(images), out, rtol=1e-5, atol=1e-5)
    without = merged(model.state_dict(), 0.0)
    plain.load_state_dict(without)
    assert (plain(images) - out).abs().max() > 1e-3  # they did something


def test_a_merged_weight_is_its_equation():
    model, scale = lora(lora_alpha=6.0)
    state, name = model.state_dict(), "blocks.1.mlp.fc2"
    a, b = (state[f"{name}.lora_{x}.default.weight"].double() for x in "AB")
    expected = state[f"{name}.base_layer.weight"].double() + 6 / 4 * b @ a
    found = merged(state, scale)[f"{name}.weight"]
    # A product of four terms and a sum, in float32.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * 2**-24)


def test_a_target_chooses_the_layers():
    model, _ = lora(lora_target=r".*\.mlp\.fc\d")
    names = {n.split(".lora_")[0] for n in model.state_dict() if ".lora_" in n}
    assert names == {f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)}


@pytest.mark.launch
@pytest.mark.slow
def test_lora_on_two_processes(digit_tree, tmp_path):
    run_dir = tmp_path / "run"
    finish(launch(
        [*NANO, "--data-dir", digit_tree, "--run-dir", run_dir, "--workers", "0", "--batch-size",
         "6", "--epochs", "1", "--warmup-epochs", "0", "--lr", "1e-2", "--pretrained",
         "--lora-rank", "4", "--model-ema"], processes=2,
    ))  # fmt: skip
    # The same batches as one process would have, to rounding.
    saved, _ = run_train(digit_tree, tmp_path / "one", "--pretrained", "--lora-rank", "4",
                         "--model-ema")  # fmt: skip
    both = load_file(run_dir / "last/model.safetensors")
    for name, value in saved.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.launch
@pytest.mark.parametrize("ema", [(), ("--model-ema", "--model-ema-decay", "0.5")])
def test_a_lora_run_leaves_a_plain_model_and_goes_on_as_itself(ema, digit_tree, tmp_path):
    flags = ("--pretrained", "--lora-rank", "4", "--checkpoint-minutes", "1e-9", *ema)
    whole = tmp_path / "whole"
    saved, _ = run_train(digit_tree, whole, *flags)
    base = shipped()
    assert saved.keys() == base.state_dict().keys()
    changed = {n for n, x in base.state_dict().items() if not saved[n].equal(x)}
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert changed == {f"{name}.weight" for name in linear} | {"head.fc.bias"}
    loaded = load_model(str(whole / "last"))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in base.parameters())
    # What the run has evaluated is what it left.
    split = DataConfig(data_dir=digit_tree, workers=0, batch_size=12)
    config = ModelConfig(model="metala_nano", img_size=32)
    from metala_vision.engine import evaluate
    from metala_vision.splits import find_split

    loaders = create_loaders(split, config, loaded, find_split(split), 0)
    figures = evaluate(loaded, loaders.val, Accelerator(cpu=True))
    told = [x for x in read_metrics(whole) if x["event"] == "eval"][-1]
    assert figures.loss == pytest.approx(told["loss"], rel=1e-5)
    assert figures.top1 == told["top1"]
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken, symlinks=True)
    shutil.rmtree(broken / "checkpoints/step-00000003")
    resumed, _ = run_train(digit_tree, broken, *flags, "--resume", "auto")
    assert_same_run(broken, whole)
    assert resumed.keys() == saved.keys()


def test_a_lora_run_is_published_with_its_average_and_without(digit_tree, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    run_train(digit_tree, run, "--pretrained", "--lora-rank", "2", "--model-ema")
    state = torch.load(run / "last/training_state.pt", weights_only=True)
    for flags, expected in (
        ((), load_file(run / "last/model.safetensors")),
        (("--no-ema", "--replace"), merged(state["model"], 1.0)),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = ["weights", "publish", run, "--out", out, "--license", "cc-by-nc-4.0", *flags]
        assert main(list(map(str, arguments))) == 0
        published = load_file(out / "model.safetensors")
        assert published.keys() == expected.keys()
        assert all(published[name].equal(value) for name, value in expected.items())
    card = (out / "README.md").read_text()
    assert "| began from | the pretrained weights of metala_nano |" in card
    assert load_model(str(out)).num_classes == 3


def test_peft_is_asked_for_without_a_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model, config = small(lora_rank=2)
    with pytest.raises(UserError, match=r"needs peft, pip install 'metala-vision\[lora\]"):
        choose_trained(model, config)


def test_our_folder_is_hidden_from_others_and_comes_back():
    with hidden_kernels(), pytest.raises(ImportError):
        import kernels  # noqa: F401, TID251
    assert "kernels" not in sys.modules
    assert metala_vision.kernels is sys.modules["metala_vision.kernels"]
