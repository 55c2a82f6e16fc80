"""A comparison: matched, resumed, and honest about what failed."""

import csv
import json
import shutil

import pytest
import yaml

from metala_vision.cli import main
from metala_vision.compare import check_matched, load_comparison
from metala_vision.config_file import CONFIG_FOLDER
from metala_vision.errors import UserError

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 1}


def comparison(tmp_path, tree=None, **changes):
    """A file with two small members on the digits' tree."""
    values = {
        "recipe": "quickstart",
        "overrides": {
            "model": {"img_size": 32, "patch_size": 8, "in_chans": 3, "model_kwargs": SMALL},
            "data": {
                "dataset": "folder", "data_dir": str(tree), "val_fraction": None, "batch_size": 12,
                "mean": None, "std": None, "workers": 0,
            },
            "optim": {"epochs": 1, "warmup_epochs": 0},
        },
        "members": ["metala_nano", "attention_nano"],
        **changes,
    }  # fmt: skip
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows(output):
    lines = (output / "compare.csv").read_text().splitlines()
    return {row["name"]: row for row in csv.DictReader(lines)}


@pytest.mark.launch
def test_a_comparison_from_its_file_to_its_table(digit_tree, tmp_path, capsys, monkeypatch):
    """One member fails; killed in the middle and started again, the table is the same."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bad = {"name": "broken", "model": "gla_nano", "settings": {"model.patch_size": 5}}
    file = comparison(
        tmp_path, digit_tree, members=["metala_nano", bad, "attention_nano"], seeds=[0, 1],
        differs=["model.patch_size"],
    )  # fmt: skip
    output = tmp_path / "out"
    monkeypatch.setattr("metala_vision.compare.check_matched", lambda comparison: None)
    flags = ["compare", str(file), "--output", str(output), "--seconds", "0.2"]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    table = (output / "compare.md").read_text()
    assert table in printed and printed.splitlines()[-1] == str(output / "compare.md")
    found = rows(output)
    assert list(found) == ["metala_nano", "broken", "attention_nano"]
    for name in ("metala_nano", "attention_nano"):
        results = [json.loads((output / f"{name}-{s}" / "result.json").read_text()) for s in (0, 1)]
        mean = sum(r["top1"] for r in results) / 2
        assert float(found[name]["top1_mean"]) == pytest.approx(mean)
        assert found[name]["top1_count"] == "2" and float(found[name]["top1_half_width"]) >= 0
        assert int(found[name]["parameters"]) == results[0]["parameters"]
        assert float(found[name]["train_img_s"]) > 1 and float(found[name]["memory_mib"]) > 1
    assert found["broken"]["top1_mean"] == "" and "patch_size" in found["broken"]["errors"]
    assert "broken failed: seed 0: " in table

    shutil.rmtree(output / "attention_nano-1")
    (output / "metala_nano-0" / "result.json").unlink()
    before = (output / "compare.csv").read_text()
    assert main(flags) == 1
    assert (output / "compare.csv").read_text() == before
    assert capsys.readouterr().out.count("seed") >= 2


def test_what_ships_is_matched():
    files = sorted((CONFIG_FOLDER / "compare").glob("*.yaml"))
    assert files
    for file in files:
        loaded = load_comparison(f"compare/{file.stem}")
        check_matched(loaded)
        names = [member.model for member in loaded.members]
        assert "deit_tiny_patch16_224" in names and any(n.startswith("attention") for n in names)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"optim.lr": 0.1}, "b and a differ in optim.lr: 0.1 and 0.002; name it under `differs`"),
        ({"model.model_kwargs": {"conv": "none"}}, "b and a differ in model.model_kwargs"),
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
        ({"recipes": "x"}, "unknown"),
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
