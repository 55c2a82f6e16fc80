"""A comparison: matched, resumed, and honest about what failed."""

import csv
import json
import shutil

import pytest
import torch

from metala_vision.build import create_model
from metala_vision.cli import _devices, main
from metala_vision.compare import check_matched, load_comparison, member_config
from metala_vision.compare import run as compare_run
from metala_vision.compare.estimates import estimate
from metala_vision.compare.run import _result, _speed, _write_configs
from metala_vision.compare.table import Row
from metala_vision.config_file import shipped_comparisons
from metala_vision.data import preprocessing_of
from metala_vision.errors import UserError
from tests.train._comparison import comparison, table


def rows(output):
    lines = (output / "compare.csv").read_text().splitlines()
    return {row["name"]: row for row in csv.DictReader(lines)}


@pytest.mark.slow  # `make quickstart` runs a comparison too
@pytest.mark.launch
def test_a_comparison_from_its_file_to_its_table(digit_tree, tmp_path, capsys, monkeypatch):
    """One member fails; with a run missing and started again, the table is the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bad = {"name": "broken", "model": "gla_nano", "settings": {"model.patch_size": 5}}
    file = comparison(
        tmp_path, digit_tree, members=["metala_nano", bad], seeds=[0, 1],
        differs=["model.patch_size"],
    )  # fmt: skip
    output = tmp_path / "out"
    monkeypatch.setattr("metala_vision.compare.run.check_matched", lambda comparison: None)
    flags = ["compare", str(file), "--output", str(output), "--seconds", "0.2"]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    text = (output / "compare.md").read_text()
    assert text in printed and printed.splitlines()[-1] == str(output / "report.html")
    found = rows(output)
    assert list(found) == ["metala_nano", "broken"]
    good = found["metala_nano"]
    results = [json.loads((output / f"metala_nano-{s}/result.json").read_text()) for s in (0, 1)]
    assert float(good["top1_mean"]) == pytest.approx(sum(r["top1"] for r in results) / 2)
    assert good["top1_count"] == "2" and float(good["top1_half_width"]) >= 0
    assert int(good["parameters"]) == results[0]["parameters"]
    assert float(good["train_img_s"]) > 1 and float(good["memory_mib"]) > 1
    assert float(good["gflops"]) > 0 and float(good["minutes"]) > 0
    assert int(good["steps"]) == results[0]["steps"]
    assert found["broken"]["top1_mean"] == "" and "patch_size" in found["broken"]["errors"]
    assert "broken failed: seed 0: " in text
    for name in ("compare.png", "curves.png"):
        assert (output / name).stat().st_size > 5000
    assert "broken failed: seed 0: " in (output / "report.html").read_text()

    shutil.rmtree(output / "metala_nano-1")
    before = table(output)
    assert main(flags) == 1
    assert table(output) == before
    assert capsys.readouterr().out.count("finished before") == 1


@pytest.mark.parametrize("name", shipped_comparisons())
def test_what_ships_is_matched(name):
    loaded = load_comparison(name)
    check_matched(loaded)
    names = [member.model for member in loaded.members]
    if not name.startswith("compare/finetune"):  # those compare ways to train one model
        assert "deit_tiny_patch16_224" in names and any(n.startswith("attention") for n in names)
    seen = set()
    for member in loaded.members:  # what is done to an image is the same for all, whoever decides
        config = member_config(loaded, member, 0)
        with torch.device("meta"):
            model = create_model(config.model, 10)
        seen.add(str(preprocessing_of(config.data, config.model, model)))
    assert len(seen) == 1


def test_every_option_of_metala_has_an_ablation():
    """Its arguments, and that members differ in what the file is about."""
    changed = {name: set() for name in shipped_comparisons() if name.startswith("ablations/")}
    for name in changed:
        for member in load_comparison(name).members:
            changed[name] |= set(member.settings.get("model.model_kwargs", {}))
    assert set().union(*changed.values()) == {
        "direction", "scans", "conv", "self_aug", "key", "tau", "shared_decay", "split_heads",
        "num_heads",
    }  # fmt: skip


def test_a_changed_file_does_not_go_on_with_other_runs(tmp_path, digit_tree, capsys):
    """What is finished would stand in the table as if it had been made so."""
    output = tmp_path / "out"
    (output / "configs").mkdir(parents=True)
    first = comparison(tmp_path, digit_tree)
    _write_configs(load_comparison(str(first)), output)
    (output / "metala_nano-0").mkdir()
    (output / "metala_nano-0" / "config.yaml").touch()
    optim = {"epochs": 2, "warmup_epochs": 0}
    second = comparison(tmp_path, digit_tree, more={"optim": optim})
    assert main(["compare", str(second), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    line = f"optim.epochs is 2, the run {output / 'metala_nano-0'} has 1: take another folder"
    assert line in error and error.count("\n") == 1
    assert not (output / "attention_nano-0").exists()
    third = comparison(tmp_path, tmp_path)
    assert main(["compare", str(third), "--output", str(output)]) == 2
    assert "data.data_dir is" in capsys.readouterr().err
    (output / "configs" / "metala_nano-0.yaml").unlink()
    assert main(["compare", str(first), "--output", str(output)]) == 2
    assert "is there, but not" in capsys.readouterr().err


def test_a_run_that_never_began_may_be_mended(tmp_path, digit_tree):
    """Its file is written anew."""
    output = tmp_path / "out"
    (output / "configs").mkdir(parents=True)
    path = output / "configs" / "metala_nano-0.yaml"
    path.write_text("optim: {opt: adamww}")
    _write_configs(load_comparison(str(comparison(tmp_path, digit_tree))), output)
    assert "adamww" not in path.read_text()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"optim.lr": 0.1}, "b and a differ in optim.lr: 0.1 and 0.002; name it under `differs`"),
        (
            {"model.model_kwargs": {"conv": "none"}},
            "b and a differ in model.model_kwargs.conv: 'none' and \"the model's own\"",
        ),
        ({"model.model_kwargs.tau": 4}, "b and a differ in model.model_kwargs.tau: 4 and "),
        ({"run.seed": 3}, "member b: run.seed is decided by seeds"),
        ({"model.depth.x": 3}, "member b: 'model.depth.x' is no section.key of a configuration"),
        ({"lr": 0.1}, "member b: 'lr' is no section.key of a configuration"),
        ({"optim.lrr": 0.1}, "unknown key 'optim.lrr'; did you mean lr?"),
    ],
)
def test_members_that_differ_in_more_than_they_say_are_refused(settings, line, tmp_path):
    members = [
        {"name": "a", "model": "metala_nano"},
        {"name": "b", "model": "metala_nano", "settings": settings},
    ]
    file = comparison(tmp_path, members=members, overrides={})
    with pytest.raises(UserError) as caught:
        check_matched(load_comparison(str(file)))
    assert line in caught.value.line


def test_what_is_named_may_differ(tmp_path):
    members = [
        {"name": "a", "model": "metala_nano"},
        {"name": "b", "model": "metala_nano", "settings": {"optim.lr": 0.1}},
    ]
    file = comparison(tmp_path, members=members, overrides={}, differs=["optim.lr"])
    check_matched(load_comparison(str(file)))


@pytest.mark.parametrize("trait", ["conv", "direction", "scans"])
def test_mixers_that_are_not_alike_are_refused(trait, tmp_path):
    """By what the model is, not only by what the file says."""
    given = {"conv": "none", "direction": "forward", "scans": "column"}[trait]
    other = {"name": "b", "model": "gla_nano", "settings": {"model.model_kwargs": {trait: given}}}
    members, differs = ["metala_nano", other], ["model.model_kwargs"]
    file = comparison(tmp_path, members=members, overrides={}, differs=differs)
    with pytest.raises(UserError, match=f"b and metala_nano differ in {trait}: "):
        check_matched(load_comparison(str(file)))
    file = comparison(tmp_path, members=members, overrides={}, differs=[*differs, trait, "conv"])
    if trait != "direction":  # a causal convolution goes with one direction
        check_matched(load_comparison(str(file)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"members": []}, "members=[] does not fit"),
        ({"members": ["metala_nano", "metala_nano"]}, "two members are called 'metala_nano'"),
        ({"members": ["metala_nanno"]}, "unknown model 'metala_nanno'; did you mean metala_nano?"),
        ({"recipes": "x"}, "unknown key 'recipes'; did you mean recipe?"),
        ({"seed": 3}, "unknown key 'seed'; did you mean seeds?"),
        ({"seeds": [1, 2, 1]}, "seeds=[1, 2, 1] does not fit: seed 1 is there twice"),
        (
            {"members": [{"name": "a", "model": "metala_nano", "setings": {}}]},
            "unknown key 'members.0.setings'; did you mean settings?",
        ),
        ({"members": [{"name": "a" * 99, "model": "metala_nano"}]}, "at most 80 characters"),
        ({"recipe": None}, "recipe=None does not fit"),
        ({"differs": ["optim.lrr"]}, "differs: unknown 'optim.lrr'; did you mean optim.lr?"),
        ({"seeds": [-1]}, "does not fit"),
        ({"members": [{"name": "a/b", "model": "metala_nano"}]}, "does not fit"),
        ({"recipe": "quickstrat"}, "no configuration 'quickstrat'"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(changes, line, tmp_path, capsys):
    file = comparison(tmp_path, **{"overrides": {}, **changes})
    assert main(["compare", str(file), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- a\n- b", "is no comparison: it needs recipe and members"),
        ("model: {model: metala_nano}", "is no comparison: it needs recipe and members"),
        ("a: [", "cannot read"),
    ],
)
def test_a_file_that_is_no_comparison_is_one_line(text, line, tmp_path, capsys):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    assert main(["compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_an_unknown_comparison_names_those_that_ship(capsys):
    assert main(["compare", "compare/quickstrat"]) == 2
    error = capsys.readouterr().err
    assert (
        "ablations/tau, compare/" in error
        and "compare/quickstart" in error
        and error.count("\n") == 1
    )


def test_an_image_size_that_is_the_models_own_is_not_matched(tmp_path):
    members = ["vit_tiny_patch16_384", "deit_tiny_patch16_224"]
    overrides = {"model": {"img_size": None, "patch_size": 16}}
    file = comparison(tmp_path, members=members, overrides=overrides)
    line = r"deit_.* and vit_.* differ in model.img_size: \(1, 224, 224\) and \(1, 384, 384\)"
    with pytest.raises(UserError, match=line):
        check_matched(load_comparison(str(file)))
    del overrides["model"]["img_size"]
    overrides |= {"model": {**overrides["model"], "img_size": 64}, "data": {"crop_pct": None}}
    file = comparison(tmp_path, members=["metala_nano", *members[1:]], overrides=overrides)
    with pytest.raises(UserError, match=r"differ in data.crop_pct: 0.9 and 1.0"):
        check_matched(load_comparison(str(file)))


def test_depth_is_a_matter_of_the_model(tmp_path):
    """Of two depths, the layers that both have are held against each other."""
    settings = {"model.model_kwargs": {"depth": 3}}
    deep = {"name": "deep", "model": "gla_nano", "settings": settings}
    differs = ["model.model_kwargs.depth"]
    check_matched(
        load_comparison(str(comparison(tmp_path, members=["metala_nano", deep], differs=differs)))
    )


def test_arguments_of_a_member_are_laid_over_those_of_all(tmp_path):
    member = {"name": "a", "model": "metala_nano", "settings": {"model.model_kwargs": {"tau": 4}}}
    loaded = load_comparison(str(comparison(tmp_path, members=[member])))
    kwargs = member_config(loaded, loaded.members[0], 0).model.model_kwargs
    assert kwargs == {"embed_dim": 32, "depth": 1, "num_heads": 1, "tau": 4}


def test_no_place_while_a_seed_is_missing():
    rows = [Row("a", "x", top1=estimate([1.0, 1.1])), Row("b", "x", top1=estimate([9.0, 9.1]))]
    compare_run._give_places(rows, 2)
    assert [row.place for row in rows] == [2, 1]
    compare_run._give_places(rows, 3)
    assert [row.place for row in rows] == [None, None]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"steps": 1}'])
def test_a_torn_file_counts_as_none(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    assert _result(tmp_path) is None
    assert _speed(tmp_path / "result.json") is None and _speed(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("mask", "gpus", "found"),
    [
        (None, "0,1", ["0", "1"]),
        (None, "1", ["1"]),
        ("4,5", "0,1", ["4", "5"]),
        ("GPU-ab, GPU-cd", "1", ["GPU-cd"]),
    ],
)
def test_gpus_are_counted_among_those_that_may_be_used(mask, gpus, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert _devices(gpus) == found


def test_a_size_that_does_not_fit_is_told_before_any_training(tmp_path, capsys):
    overrides = {"model": {"img_size": 32, "patch_size": 8, "in_chans": 1}}
    file = comparison(tmp_path, overrides=overrides, sizes=[64, 60])
    assert main(["compare", str(file), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "8x8 px, got 60" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
