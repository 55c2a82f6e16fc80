"""Training that begins from weights: what is loaded, what is trained, what is left behind."""

import math
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

from metala_vision.build import collect, create_model
from metala_vision.config import Config, ModelConfig, OptimConfig
from metala_vision.engine import train_epoch
from metala_vision.models import FAMILIES
from metala_vision.optim import create_optimizer
from metala_vision.recipe import WeightedCrossEntropy, weigh_classes
from metala_vision.run_folder import read_metrics
from metala_vision.transfer import (
    begins_from,
    choose_trained,
    fit_head,
    frozen_modules,
    layers_of,
)
from tests.conftest import SMALL_MODEL
from tests.train._runs import metrics
from tests.train._transfer import NANO, SMALL, run_train, shipped, small

# What it begins from


def test_a_run_begins_from_the_shipped_weights(digit_tree, tmp_path):
    saved, described = run_train(
        digit_tree, tmp_path / "run", "--pretrained", "--lr", "1e-12", "--weight-decay", "0"
    )
    for name, value in shipped().state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-10)
    assert described["label_names"] == ["digit0", "digit1", "digit2"]
    text = (tmp_path / "run/last/config.json").read_text()
    assert "weights/" not in text and "n01443537" not in text and '"tag"' not in text
    card = (tmp_path / "run/README.md").read_text()
    assert "| began from | its weights tiny_imagenet, a new classifier |" in card


def test_from_scratch_begins_with_none_of_them(digit_tree, tmp_path):
    saved, _ = run_train(digit_tree, tmp_path / "run", "--lr", "1e-12")
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.allclose(saved[name], shipped().state_dict()[name], atol=1e-2)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_run_begins_from_another(what, digit_tree, tmp_path):
    model = (*NANO, "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=1", "tau=8",
             "direction=forward")  # fmt: skip
    first, _ = run_train(
        digit_tree, tmp_path / "first", "--mean", "0.3", "--std", "0.4", "--crop-pct", "0.7",
        model=model,
    )  # fmt: skip
    path = tmp_path / "first/last" / ("" if what == "folder" else "model.safetensors")
    # A folder tells the model, its sizes and arguments; of a file they must be given.
    told = () if what == "folder" else model
    second, described = run_train(
        digit_tree, tmp_path / "second", "--pretrained-path", path, "--lr", "1e-12",
        "--weight-decay", "0", model=told,
    )  # fmt: skip
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-10)  # the head too
    assert described["architecture"] == "metala_nano"
    args = described["model_args"]
    assert (args["tau"], args["direction"], args["patch_size"]) == (8, "forward", 8)
    if what == "folder":
        cfg = described["pretrained_cfg"]
        assert (cfg["mean"], cfg["crop_pct"], cfg["input_size"][1:]) == ([0.3] * 3, 0.7, [32, 32])
    config = (tmp_path / "second/config.yaml").read_text()
    assert "tau: 8" in config and str(path).rstrip("/") in config


def test_what_is_given_overrides_what_a_folder_tells(digit_tree, tmp_path):
    run_train(digit_tree, tmp_path / "run", model=SMALL_MODEL)
    config = ModelConfig(
        pretrained_path=tmp_path / "run/last", patch_size=4, model_kwargs={"tau": 4}
    )
    resolved, weights = begins_from(config)
    assert (resolved.model, resolved.patch_size, resolved.img_size) == ("metala_nano", 4, 32)
    assert resolved.model_kwargs == {
        "embed_dim": 32, "depth": 2, "num_heads": 1, "tau": 4, "global_pool": "avg"
    }  # fmt: skip
    assert create_model(resolved, 5, weights).patch_embed.proj.weight.shape == (32, 3, 4, 4)


def test_the_classifier_is_kept_for_the_same_classes_alone():
    def model(names):
        built = timm.create_model("metala_nano", num_classes=3, **SMALL, num_heads=1)
        built.pretrained_cfg = {"num_classes": 3, "label_names": names, "tag": "x"}
        return built

    names = ["a", "b", "c"]
    for known, classes, kept in (
        (names, names, True), (tuple(names), names, True), (None, names, True),
        (names, ["a", "c", "b"], False), (names, ["d", "e", "f"], False),
    ):  # fmt: skip
        built = model(known)
        before = built.head.fc.weight.clone()
        told = fit_head(built, classes, 3)
        assert built.head.fc.weight.equal(before) == kept
        assert told == f"its weights x, {'their' if kept else 'a new'} classifier"
        assert "label_names" not in built.pretrained_cfg


def test_a_model_of_timm_begins_from_a_file_with_another_head(tmp_path):
    before = timm.create_model("test_vit", num_classes=7)
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    config, weights = begins_from(
        ModelConfig(model="test_vit", pretrained_path=tmp_path / "model.safetensors")
    )
    after = create_model(config, 4, weights)
    assert after.head.weight.shape[0] == 4
    assert after.blocks[0].attn.qkv.weight.equal(before.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("kind", ["grey", "larger", "finer"])
def test_another_size_channel_and_patch(kind, digit_tree, tmp_path):
    flags = {"grey": ("--in-chans", "1", "--mean", "0.3", "--std", "0.4"),
             "larger": ("--img-size", "64"), "finer": ("--patch-size", "4")}[kind]  # fmt: skip
    saved, _ = run_train(
        digit_tree, tmp_path / "run", "--pretrained", "--lr", "1e-12", *flags, steps=1
    )
    shape = {"grey": (128, 1, 8, 8), "larger": (128, 3, 8, 8), "finer": (128, 3, 4, 4)}[kind]
    assert saved["patch_embed.proj.weight"].shape == shape


# What is trained


def test_a_linear_probe_leaves_the_backbone_as_it_is(digit_tree, tmp_path):
    flags = ("--pretrained", "--linear-probe", "--drop-path-rate", "0.5")
    saved, _ = run_train(digit_tree, tmp_path / "run", *flags)
    for name, value in shipped().state_dict().items():
        assert saved[name].equal(value) != name.startswith("head."), name


def test_a_linear_probe_leaves_moving_statistics_as_they_are(digit_tree, tmp_path):
    saved, _ = run_train(
        digit_tree, tmp_path / "run", "--linear-probe",
        model=("--model", "test_resnet", "--img-size", "32"),
    )  # fmt: skip
    assert saved["bn1.num_batches_tracked"] == 0 and saved["bn1.running_mean"].eq(0).all()
    trained, _ = run_train(
        digit_tree, tmp_path / "whole", model=("--model", "test_resnet", "--img-size", "32")
    )
    assert trained["bn1.num_batches_tracked"] == 3  # the guard can fail


@pytest.mark.parametrize("layers", [1, 3])
def test_frozen_layers_get_no_gradient_and_stay(layers, digit_tree, tmp_path):
    saved, _ = run_train(digit_tree, tmp_path / "run", "--pretrained", "--freeze-layers", layers)
    frozen = ["patch_embed.", *(f"blocks.{i}." for i in range(layers - 1))]
    for name, value in shipped().state_dict().items():
        assert saved[name].equal(value) == name.startswith(tuple(frozen)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_the_rest_learns(family):
    model, config = small(family, freeze_layers=2)
    choose_trained(model, config)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    layers = layers_of(model)
    assert with_gradient == {name for name, layer in layers.items() if layer >= 2}
    assert {layers[name] for name in layers if name.startswith("blocks.1.")} == {2}
    assert layers["patch_embed.proj.weight"] == 0 and layers["head.fc.weight"] == 3


def test_layers_are_those_of_layer_decay():
    model, _ = small()
    layers = layers_of(model)
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5), 1.0)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == 0.5 ** (max(layers.values()) - layers[name]), name


def test_what_is_frozen_is_in_evaluation_mode(digit_tree, tmp_path):
    config = Config.model_validate({
        "model": {"model": "metala_nano", "img_size": 32, "patch_size": 8, "freeze_layers": 2,
                  "drop_path_rate": 0.5, "model_kwargs": {**SMALL, "num_heads": 1}},
        "data": {"data_dir": digit_tree, "workers": 0, "batch_size": 12},
        "optim": {"epochs": 1, "max_steps": 1}, "run": {"run_dir": tmp_path / "run"},
    })  # fmt: skip
    built = collect(config, Accelerator(cpu=True))
    train_epoch(built.training, built.loaders.train)
    model = built.training.model
    assert model.training and model.blocks[1].training and model.head.training
    assert not any(
        m.training for part in (model.patch_embed, model.blocks[0]) for m in part.modules()
    )
    assert frozen_modules(model) == [model.patch_embed, model.blocks[0]]


# The loss, and the end


def test_balanced_weights_make_classes_alike():
    import numpy as np

    counts = np.array([10, 30, 0, 60])
    weights = weigh_classes(OptimConfig(class_weights="balanced"), counts).double()
    torch.testing.assert_close(
        weights, torch.tensor([100 / 30, 100 / 90, 0, 100 / 180]).double(), rtol=1e-6, atol=0
    )
    assert math.isclose((weights * torch.tensor(counts)).sum() / counts.sum(), 1, rel_tol=1e-6)
    assert weigh_classes(OptimConfig(), counts) is None
    own = weigh_classes(OptimConfig(class_weights=(1, 2, 3, 4)), counts)
    assert own.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_is_its_equation(smoothing):
    torch.manual_seed(0)
    logits, weights = torch.randn(6, 4, dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5, 3.0])
    labels = torch.tensor([0, 1, 2, 3, 3, 1])
    target = (1 - smoothing) * F.one_hot(labels, 4).double() + smoothing / 4
    expected = -(weights * target * logits.log_softmax(1)).sum() / 6
    loss = WeightedCrossEntropy(weights, smoothing)
    assert loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss(logits, target).item() == pytest.approx(expected.item(), rel=1e-12)  # mixed


def test_class_weights_reach_the_loss(digit_tree, tmp_path):
    def first_loss(name, *flags):
        run_train(digit_tree, tmp_path / name, "--log-interval", "1", *flags, model=SMALL_MODEL)
        return next(x["loss"] for x in read_metrics(tmp_path / name) if x["event"] == "train")

    plain = first_loss("plain")
    assert first_loss("same", "--class-weights", "balanced") == pytest.approx(plain, rel=1e-5)
    twice = first_loss("twice", "--class-weights", "2", "2", "2")
    assert twice == pytest.approx(2 * plain, rel=1e-5)


def test_patience_ends_a_run_and_a_resumed_one_at_the_same_step(digit_tree, tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = ("--lr", "1e-12", "--epochs", "9", "--max-steps", "27", "--patience", "2")
    run_train(digit_tree, run_dir, *flags, model=SMALL_MODEL)  # learns nothing: top-1 never rises
    evals = [x for x in metrics(run_dir) if x["event"] == "eval"]
    assert [x["epoch"] for x in evals] == [1, 2, 3]
    assert "ended by patience=2: no better top-1 since step 3" in capsys.readouterr().out
    assert "| trained | 3 epochs, 9 steps" in (run_dir / "README.md").read_text()
    run_train(digit_tree, run_dir, *flags, "--resume", "auto", model=SMALL_MODEL)
    assert [x for x in metrics(run_dir) if x["event"] == "eval"] == evals


# The configurations that ship


@pytest.mark.launch
@pytest.mark.parametrize("name", ["folder", "linear_probe", "lora"])
def test_a_configuration_runs_on_ten_images_a_class(name, digit_tree, tmp_path):
    tree = shutil.copytree(digit_tree / "train", tmp_path / "photos")
    for folder in tree.iterdir():
        for path in sorted(folder.iterdir())[10:]:
            path.unlink()
    saved, described = run_train(
        tree, tmp_path / "run", "--config", f"finetune/{name}", "--val-fraction", "0.2", model=()
    )
    assert saved.keys() == shipped().state_dict().keys()
    assert described["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_the_configuration_of_the_hub_reads_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    names = ["angular_leaf_spot", "bean_rust", "healthy"]  # as that data set has them
    features = datasets.Features(
        image_file_path=datasets.Value("string"), image=datasets.Image(),
        labels=datasets.ClassLabel(names=names),
    )  # fmt: skip
    leaves = [Image.new("RGB", (50, 50), (40 * i, 90, 10)) for i in range(6)]
    rows = {"image_file_path": [f"{i}.jpg" for i in range(6)], "image": leaves,
            "labels": [i % 3 for i in range(6)]}  # fmt: skip
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=made, validation=made).save_to_disk(tmp_path / "beans")
    _, described = run_train(
        tmp_path / "beans", tmp_path / "run", "--config", "finetune/hub", "--dataset", "hfds",
        "--batch-size", "3", model=(),
    )  # fmt: skip
    assert described["label_names"] == names
