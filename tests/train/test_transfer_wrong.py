"""What a user gets wrong where training begins from weights: one clear line each."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from metala_vision.build import create_model
from metala_vision.cli import main
from metala_vision.compare.comparison import check_matched, load_comparison
from metala_vision.config import ModelConfig, OptimConfig
from metala_vision.config_file import load_config
from metala_vision.errors import UserError
from metala_vision.recipe import weigh_classes
from metala_vision.transfer import begins_from, check_whole, choose_trained
from tests.conftest import SMALL_MODEL
from tests.train.test_transfer import run_train, small


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"pretrained": True, "pretrained_path": "x"}, "pretrained=True and pretrained_path=x are"),
        ({"freeze_layers": 2, "linear_probe": True}, "freeze_layers=2 and linear_probe=True are"),
        ({"lora_rank": 2, "linear_probe": True}, "linear_probe=True and lora_rank=2 are given"),
        ({"lora_alpha": 2.0}, r"lora_alpha=2.0 has no effect without lora_rank"),
        ({"lora_target": "x"}, r"lora_target=x has no effect without lora_rank"),
        ({"lora_rank": 0}, "greater than 0"),
    ],
)
def test_keys_that_exclude_each_other(given, line):
    with pytest.raises(ValidationError, match=line):
        ModelConfig(**given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"freeze_layers": 4}, "freeze_layers=4: metala_nano has 3 layers before the classifier's"),
        ({"lora_rank": 2, "lora_target": "nothing"}, "'nothing' names no linear layer; there is "),
        ({"lora_rank": 2, "lora_target": "("}, r"lora_target='\(' is no pattern: "),
    ],
)
def test_parts_that_are_not_there(given, line):
    model, config = small(**given)
    with pytest.raises(UserError, match=line):
        choose_trained(model, config)


def test_class_weights_that_do_not_fit():
    with pytest.raises(UserError, match=r"class_weights has 2 numbers for 3 outputs"):
        weigh_classes(OptimConfig(class_weights=(1, 2)), np.array([1, 1, 1]))
    with pytest.raises(UserError, match="not with bce_loss"):
        weigh_classes(OptimConfig(class_weights="balanced", bce_loss=True), np.array([1, 1]))
    with pytest.raises(ValidationError):
        OptimConfig(class_weights="blanced")  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def checkpoint(digit_tree, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("checkpoint") / "run"
    run_train(digit_tree, run_dir, model=SMALL_MODEL, steps=1)
    return run_dir / "last"


def wrong(path, **given):
    with pytest.raises(UserError) as told:
        config, weights = begins_from(ModelConfig(pretrained_path=path, **given))
        check_whole(create_model(config, 3, weights), config, weights)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_paths_that_are_no_checkpoint(checkpoint, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert wrong(nowhere) == f"model.pretrained_path={nowhere}: there is no {nowhere}"
    (tmp_path / "a").mkdir()
    (tmp_path / "a/photo.jpg").touch()
    assert "is no checkpoint: it holds photo.jpg, but no config.json" in wrong(tmp_path / "a")
    run_dir = checkpoint.parent
    assert wrong(run_dir).endswith(
        f"is no checkpoint: its checkpoints are {run_dir}/last and {run_dir}/best"
    )
    (tmp_path / "a/config.json").write_text("[]")
    assert "config.json: all of it: Input should be an object" in wrong(tmp_path / "a")
    pickle = tmp_path / "model.pth"
    torch.save({"a": torch.ones(1)}, pickle)
    assert "model.pth cannot be read as safetensors" in wrong(pickle, model="metala_nano")


def test_a_checkpoint_of_another_model(checkpoint):
    line = wrong(checkpoint, model="metala_tiny")
    assert line == f"model.pretrained_path={checkpoint} holds metala_nano, not metala_tiny"
    line = wrong(checkpoint / "model.safetensors", model="metala_nano")
    assert "do not fit" in line or "lack" in line
    line = wrong(checkpoint / "model.safetensors", model="test_vit")
    assert line.startswith("cannot load the weights of test_vit: ")


def test_a_head_of_another_width(checkpoint, tmp_path):
    folder = tmp_path / "narrow"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["head.fc.weight"] = weights["head.fc.weight"][:, :16].contiguous()
    save_file(weights, folder / "model.safetensors")
    assert wrong(folder).endswith("do not fit: head.fc.weight is (3, 16), not (3, 32)")
    described = json.loads((folder / "config.json").read_text())
    described["model_args"]["embed_dim"] = 64
    (checkpoint.parent / "wide").mkdir()
    (checkpoint.parent / "wide/config.json").write_text(json.dumps(described))
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "wide")
    assert "is (" in wrong(checkpoint.parent / "wide")


def test_weights_that_are_not_there():
    with pytest.raises(UserError, match="no weights for metala_tiny in this package"):
        create_model(ModelConfig(model="metala_tiny"), 3, {"pretrained": True})


@pytest.mark.parametrize("classes", [3, 5])
def test_a_model_of_timm_is_not_begun_from_a_part(classes, tmp_path):
    """timm leaves out what it does not find where the number of classes differs."""
    path = tmp_path / "model.safetensors"
    config = ModelConfig(model="test_vit", pretrained_path=path)

    def refused(model):
        save_file(model.state_dict(), path)
        with pytest.raises(UserError) as told:
            resolved, weights = begins_from(config)
            check_whole(create_model(resolved, classes, weights), resolved, weights)
        assert "\n" not in str(told.value) and len(str(told.value)) < 400
        return str(told.value)

    line = refused(timm.create_model("test_resnet", num_classes=3))
    assert "is of another model" in line or "cannot load the weights of test_vit" in line
    line = refused(timm.create_model("test_vit", num_classes=3, depth=4))
    assert "has blocks.4." in line or "cannot load the weights" in line
    line = refused(timm.create_model("test_vit", num_classes=3, depth=8))
    assert "has blocks.6." in line or "cannot load the weights" in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_args", None), ("pretrained_cfg", [1]), ("label_names", 5), ("architecture", 3),
        ("pretrained_cfg", {"input_size": []}), ("pretrained_cfg", {"mean": "x"}),
        ("pretrained_cfg", {"input_size": [3, 0, 32]}),
    ],
)  # fmt: skip
def test_a_description_of_another_shape(key, value, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, key: value}))
    assert wrong(folder).startswith(f"cannot read {folder / 'config.json'}: {key}")


def test_a_description_does_not_choose_what_is_loaded(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    described = json.loads((folder / "config.json").read_text())
    described["model_args"] |= {"checkpoint_path": str(tmp_path / "x.pth"), "features_only": True}
    (folder / "config.json").write_text(json.dumps(described))
    config, weights = begins_from(ModelConfig(pretrained_path=folder))
    assert not {"checkpoint_path", "features_only"} & set(config.model_kwargs)
    create_model(config, 3, weights)
    with pytest.raises(UserError, match="model_kwargs takes no checkpoint_path="):
        create_model(ModelConfig(model="test_vit", model_kwargs={"checkpoint_path": "x"}), 3)


def test_lora_where_it_would_do_nothing():
    config = ModelConfig(
        model="beit_base_patch16_224", lora_rank=2, img_size=32,
        model_kwargs={"depth": 1, "embed_dim": 32, "num_heads": 2},
    )  # fmt: skip
    model = create_model(config, 3)
    with pytest.raises(UserError, match=r"reads the weight of blocks.0.attn.qkv without calling"):
        choose_trained(model, config)
    config.lora_target = r".*\.mlp\.fc\d"
    choose_trained(create_model(config, 3), config)


def test_lora_that_does_not_fit():
    model, config = small(lora_rank=33)
    with pytest.raises(UserError, match=r"lora_rank=33: .* is of rank 32 at most"):
        choose_trained(model, config)
    config = ModelConfig(model="test_resnet", lora_rank=2)
    with pytest.raises(UserError, match="test_resnet has no linear layer but its classifier"):
        choose_trained(create_model(config, 3), config)
    config = ModelConfig(model="deit_tiny_distilled_patch16_224", linear_probe=True)
    with pytest.raises(UserError, match="several classifiers"):
        choose_trained(create_model(config, 3), config)


@pytest.mark.parametrize("how", ["by its folder", "by the same flags"])
def test_a_run_is_resumed_when_what_it_began_from_is_gone(how, digit_tree, tmp_path):
    first = tmp_path / "first"
    run_train(digit_tree, first, "--mean", "0.3", "--std", "0.4", model=SMALL_MODEL, steps=1)
    flags = ("--pretrained-path", first / "last", "--checkpoint-minutes", "1e-9")
    saved, described = run_train(digit_tree, tmp_path / "run", *flags, model=())
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    AcceleratorState._reset_state(reset_partial_state=True)
    if how == "by its folder":
        assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    else:
        run_train(digit_tree, tmp_path / "run", *flags, "--resume", "auto", model=())
    again = load_file(tmp_path / "run/last/model.safetensors")
    assert all(again[name].equal(value) for name, value in saved.items())
    now = json.loads((tmp_path / "run/last/config.json").read_text())
    assert now == described
    assert "| began from | " + str(first) in (tmp_path / "run/README.md").read_text()


def test_a_pool_of_another_kind_is_taken_along(digit_tree, tmp_path):
    run_train(digit_tree, tmp_path / "run", model=(*SMALL_MODEL, "global_pool=max"), steps=1)
    config, weights = begins_from(ModelConfig(pretrained_path=tmp_path / "run/last"))
    before = timm.create_model(f"local-dir:{tmp_path / 'run/last'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert create_model(config, 3, weights).eval()(images).equal(before(images))


def test_members_of_a_comparison_end_alike(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: finetune/folder\nmembers: [metala_nano, attention_nano]\n"
                    "overrides: {model: {pretrained: false}}\n")  # fmt: skip
    with pytest.raises(UserError, match=r"metala_nano: run.patience=10 would end runs at"):
        check_matched(load_comparison(str(file)))


def test_a_file_and_a_flag_that_exclude_each_other_say_how_to_go_on(checkpoint):
    with pytest.raises(UserError, match=r"one of them is accepted; .* as --pretrained false"):
        load_config("finetune/folder", {"model": {"pretrained_path": str(checkpoint)}})


def test_no_held_out_image_of_the_classes(digit_tree, tmp_path, capsys):
    listed = tmp_path / "held.txt"
    listed.write_text("digit0/00.png\n")
    flags = ["--data-dir", str(digit_tree / "train"), "--val-file", str(listed), "--class-range"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", *SMALL_MODEL, *flags, "1", "3"]) == 2
    assert "no held-out image of classes 1 to 2" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (
        main(["features", "metala_nano", *flags[:-1], "--k", "5", "--no-probe", "--workers", "0"])
        == 0
    )


def test_outputs_without_a_class_are_numbers(digit_tree, tmp_path, capsys):
    run_train(digit_tree, tmp_path / "run", "--num-classes", "5", model=SMALL_MODEL, steps=1)
    image = str(next((digit_tree / "val/digit1").iterdir()))
    capsys.readouterr()
    assert main(["predict", image, "--model", str(tmp_path / "run/last")]) == 0
    names = {line.split()[-1] for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert names == {"digit0", "digit1", "digit2", "3", "4"}
