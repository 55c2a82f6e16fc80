"""`metala-vision weights`: a run becomes a folder that timm reads, with the run's accuracy."""

import json
import multiprocessing
import os
import shutil

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from metala_vision.checkpoint import _describe
from metala_vision.cli import main
from metala_vision.evaluate import evaluate_checkpoint
from metala_vision.publish.card import scrubbed
from metala_vision.weights import source
from tests.conftest import SMALL_MODEL

from ._server import Uploads, serving
from .conftest import hub_constants

NANO = ("--model", "metala_nano", "--img-size", "32", "--patch-size", "8")


def trained(folder, tree, *flags, model=NANO):
    run = folder / "run"
    common = ["--data-dir", str(tree), "--run-dir", str(run), "--workers", "0", "--batch-size",
              "12", "--epochs", "2", "--lr", "3e-3", "--warmup-epochs", "0"]  # fmt: skip
    assert main(["train", *common, *model, *flags]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


@pytest.fixture(scope="module")
def run(digit_tree, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"), digit_tree)


@pytest.fixture(scope="module")
def averaged(digit_tree, tmp_path_factory):
    """With an average of the weights."""
    return trained(tmp_path_factory.mktemp("ema"), digit_tree, "--model-ema")


@pytest.fixture
def copy(run, tmp_path):
    """One that a test may damage."""
    return shutil.copytree(run, tmp_path / "copy", symlinks=True)


def publish(run, out, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["weights", "publish", str(run), "--out", str(out), "--license", "apache-2.0",
                 *map(str, flags)])  # fmt: skip


def refused(capsys, run, out, *flags):
    capsys.readouterr()
    assert publish(run, out, *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("metala-vision: error: ") and "Traceback" not in "".join(lines)
    return lines[-1].removeprefix("metala-vision: error: ")


def scores(checkpoint, tree):
    AcceleratorState._reset_state(reset_partial_state=True)
    report = evaluate_checkpoint(str(checkpoint), tree, workers=0)
    return report.top1, report.top5, report.loss, report.images


def test_the_folder_is_read_by_timm_with_the_same_answers(run, digit_tree, tmp_path, capsys):
    assert publish(run, tmp_path / "out") == 0
    assert scores(tmp_path / "out", digit_tree) == scores(run / "last", digit_tree)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["README.md", "config.json", "config.yaml", "curve.png", "metrics.jsonl",
                     "model.safetensors"]  # fmt: skip
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == ["digit0", "digit1", "digit2"]
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 32, 32)
    evaluation = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"top-1 {evaluation['top1']:.2f} % on 12 images" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_tag_is_read_from_a_folder_of_weights(
    dtype, run, digit_tree, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    flags = ["--tag", "digits", "--dtype", dtype, "--data-dir", digit_tree, "--workers", 0]
    assert publish(run, out, *flags) == 0
    monkeypatch.setenv(source.WEIGHTS_VARIABLE, str(out))
    model = timm.create_model("metala_nano.digits", pretrained=True)
    kind = getattr(torch, dtype)
    for name, x in load_file(run / "last" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], x.to(kind).float())
    entry = json.loads((out / "manifest.json").read_text())["weights"]["metala_nano.digits"]
    for checkpoint in ("metala_nano.digits", out / "metala_nano.digits"):
        top1, top5, _, images = scores(checkpoint, digit_tree)
        assert entry["metrics"] == {"top1": top1, "top5": top5, "images": images}
    alone = json.loads((out / "metala_nano.digits" / "manifest.json").read_text())
    assert alone["weights"]["metala_nano.digits"] == {**entry, "file": "model.safetensors"}
    capsys.readouterr()
    assert main(["weights", "list"]) == 0
    assert f"{entry['metrics']['top1']:.2f}  apache-2.0  {out}" in capsys.readouterr().out
    assert main(["weights", "download", "metala_nano.digits"]) == 0
    path = out / "metala_nano.digits" / "model.safetensors"
    assert capsys.readouterr().out == f"metala_nano.digits  {path}\n"
    assert main(["weights", "verify", "metala_nano.digits", str(out), str(path.parent)]) == 0
    line = f"metala_nano.digits: ok, {entry['size']:,} bytes, sha256 {entry['sha256']}"
    assert capsys.readouterr().out.splitlines() == [line] * 3


def test_the_card_is_true_and_names_no_place(run, digit_tree, tmp_path):
    out = tmp_path / "out" / "metala_nano.digits"
    flags = ["--tag", "digits", "--dtype", "float16", "--dataset", "Digits", "--terms", "free"]
    assert publish(run, tmp_path / "out", *flags) == 0
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "timm"
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    entry = json.loads((out / "manifest.json").read_text())["weights"]["metala_nano.digits"]
    for fact in (
        "| trained on | Digits |", "6 steps, 2.0 epochs", entry["sha256"], "free",
        "before rounding to float16",
    ):  # fmt: skip
        assert fact in card, fact
    environment = json.loads((run / "environment.json").read_text())
    assert str(environment["commit"] or "no checkout") in card
    for path in out.iterdir():
        if path.suffix not in (".safetensors", ".png"):
            text = path.read_text()
            assert str(run.parent) not in text and str(digit_tree) not in text, path
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["optim"]["lr"] == 3e-3  # resolved, and a run can be started from it
    assert publish(run, tmp_path / "exact") == 0
    assert "held-out images, of this file" in (tmp_path / "exact" / "README.md").read_text()


def test_the_average_or_the_weights_themselves(averaged, tmp_path, capsys):
    saved = load_file(averaged / "last" / "model.safetensors")
    last = torch.load(averaged / "last" / "training_state.pt", weights_only=True)["model"]
    assert publish(averaged, tmp_path / "ema") == 0
    assert publish(averaged, tmp_path / "raw", "--no-ema") == 0
    for name, x in load_file(tmp_path / "ema" / "model.safetensors").items():
        assert torch.equal(x, saved[name])
    raw = load_file(tmp_path / "raw" / "model.safetensors")
    assert all(torch.equal(x, last[name]) for name, x in raw.items())
    assert any(not torch.equal(x, saved[name]) for name, x in raw.items())
    assert "averaged over the steps" in (tmp_path / "ema" / "README.md").read_text()
    card = (tmp_path / "raw" / "README.md").read_text()
    assert "averaged" not in card and "not evaluated" in card  # the run's figures are the average's


def test_without_an_average_there_is_none(run, tmp_path, capsys):
    line = refused(capsys, run, tmp_path / "out", "--no-ema")
    assert line == f"--no-ema: the run in {run} averages no weights"


@pytest.mark.parametrize(
    ("word", "told"),
    [("/home/me/x", "DIR"), ("~/x", "DIR"), ("../me/x.yaml", "DIR"), ("./x", "DIR"),
     ("--run-dir=/home/me", "--run-dir=DIR"), ("local-dir:/home/me/x", "local-dir:DIR"),
     ("--distill-teacher=local-dir:../x", "--distill-teacher=local-dir:DIR"),
     ("C:\\Users\\me", "DIR"), ("file=/home/me", "file=/home/me"),
     ("imagenet1k/metala_tiny", "imagenet1k/metala_tiny"), ("hfds/me/pets", "hfds/me/pets"),
     ("hf-hub:me/x", "hf-hub:me/x"), ("rand-m9-mstd0.5", "rand-m9-mstd0.5"), ("1e-3", "1e-3")],
)  # fmt: skip
def test_paths_are_not_told(word, told):
    assert scrubbed({"a": [word, 3]}) == {"a": [told, 3]}


def test_a_place_in_any_setting_is_not_told(run, digit_tree, tmp_path):
    secret = shutil.copytree(run / "last", tmp_path / "alice" / "teacher")
    student = trained(
        tmp_path, digit_tree, "--epochs", "1", "--distill-teacher", f"local-dir:{secret}"
    )
    assert publish(student, tmp_path / "out") == 0
    for path in (tmp_path / "out").iterdir():
        assert b"alice" not in path.read_bytes(), path


def test_nothing_but_a_publication_is_replaced(copy, run, tmp_path, capsys):
    line = refused(capsys, copy, copy, "--replace")
    assert line == f"{copy} holds .lock, which no publication has: it is not replaced"
    assert (copy / "last" / "model.safetensors").is_file()
    out = tmp_path / "out"
    assert publish(run, out, "--tag", "a") == 0
    assert "it is not replaced" in refused(capsys, run, out, "--replace")  # --tag forgotten
    (out / "metala_nano.a" / "notes.txt").write_text("precious")
    line = refused(capsys, run, out, "--tag", "a", "--replace")
    assert "holds notes.txt, which no publication has" in line
    (tmp_path / "file").touch()
    assert refused(capsys, run, tmp_path / "file") == f"{tmp_path / 'file'} is no folder"


def test_a_damaged_manifest_is_told_before_anything_is_written(run, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}{}")
    assert "is no manifest of weights" in refused(capsys, run, tmp_path, "--tag", "a")
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_publishers_at_once_leave_what_can_be_loaded(run, tmp_path):
    """Of the same tag without --replace: one of them, and its manifest."""
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_publish, args=(run, tmp_path / "out", dtype))
        for dtype in ("float16", "float32", "bfloat16")
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert sorted(child.exitcode for child in children) == [0, 2, 2]
    assert main(["weights", "verify", str(tmp_path / "out")]) == 0
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".metala")]


def _publish(run, out, dtype):
    os._exit(publish(run, out, "--tag", "a", "--dtype", dtype))


def test_the_current_folder_and_a_run_without_its_facts(copy, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert publish(copy, ".") == 0 and (tmp_path / "here" / "config.json").is_file()
    (copy / "environment.json").unlink()
    line = refused(capsys, copy, tmp_path / "out")
    assert line == f"{copy} is no run: environment.json is missing"
    line = refused(capsys, copy, tmp_path / "out", "--license", "other")
    assert line == "--license other needs --terms"


def test_terms_cannot_break_the_card(run, tmp_path):
    assert publish(run, tmp_path / "out", "--terms", "free | for\nresearch") == 0
    rows = [x for x in (tmp_path / "out" / "README.md").read_text().splitlines() if x[:2] == "| "]
    assert "| license | apache-2.0: free \\| for research |" in rows


def test_mixed_precision_is_told(digit_tree, tmp_path):
    run = trained(tmp_path, digit_tree, "--epochs", "1", "--mixed-precision", "bf16")
    assert (
        publish(run, tmp_path / "a") == 0
        and publish(run, tmp_path / "b", "--dtype", "float16") == 0
    )
    assert "images, of the run, in bf16 |" in (tmp_path / "a" / "README.md").read_text()
    card = (tmp_path / "b" / "README.md").read_text()
    assert "images, of the run, in bf16, before rounding to float16 |" in card


def test_an_argument_that_changes_no_shape_is_noticed(digit_tree, tmp_path, capsys):
    run = trained(tmp_path, digit_tree, "--epochs", "1", "--model-kwargs", "direction=forward")
    assert "its own direction, patch_size, which a tag" in refused(
        capsys, run, tmp_path / "out", "--tag", "small"
    )


def test_two_tags_lie_beside_each_other(run, averaged, tmp_path, capsys):
    out = tmp_path / "out"
    assert publish(run, out, "--tag", "b") == 0 and publish(averaged, out, "--tag", "a") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["weights"]) == ["metala_nano.a", "metala_nano.b"]
    before = (out / "metala_nano.a" / "model.safetensors").read_bytes()
    line = refused(capsys, run, out, "--tag", "a")
    assert line == f"{out / 'metala_nano.a'} is there already; --replace writes over it"
    assert publish(run, out, "--tag", "a", "--replace") == 0
    assert (out / "metala_nano.a" / "model.safetensors").read_bytes() != before
    assert main(["weights", "verify", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        "manifest.json", "metala_nano.a", "metala_nano.b"
    ]  # fmt: skip


def test_a_model_that_a_tag_cannot_hold_is_a_folder(digit_tree, tmp_path, capsys):
    run = trained(tmp_path, digit_tree, "--epochs", "1", model=SMALL_MODEL)
    line = refused(capsys, run, tmp_path / "out", "--tag", "small")
    assert "the run's metala_nano has its own depth, embed_dim, num_heads, patch_size, wh" in line
    assert not (tmp_path / "out").exists()
    assert publish(run, tmp_path / "out") == 0
    assert scores(tmp_path / "out", digit_tree) == scores(run / "last", digit_tree)


def damage(run, change):
    """The last checkpoint with other weights, its own manifest right."""
    folder = (run / "last").resolve()
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = _describe(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_not_finite_is_not_published(copy, tmp_path, capsys):
    damage(copy, lambda state: state["norm.weight"].fill_(1e5))
    line = refused(capsys, copy, tmp_path / "out", "--dtype", "float16")
    assert line == "norm.weight is too large for float16; it is not published"
    damage(copy, lambda state: state["norm.weight"][3:].fill_(float("nan")))
    line = refused(capsys, copy, tmp_path / "out")
    assert line == "norm.weight is not finite; it is not published"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_no_run_no_checkpoint_a_damaged_one(copy, tmp_path, capsys):
    assert refused(capsys, tmp_path / "no", tmp_path / "out") == (
        f"{tmp_path / 'no'} is no run: config.yaml is missing"
    )
    path = (copy / "last").resolve() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "is damaged: sha256" in refused(capsys, copy, tmp_path / "out")
    shutil.rmtree(copy / "checkpoints")
    line = refused(capsys, copy, tmp_path / "out", "--checkpoint", "best")
    assert line == f"{copy} has no checkpoint 'best' yet"
    assert not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line(run, tmp_path, capsys):
    for tag in ("A", "a.b", "", "a/b", "../a"):
        assert "small letters, digits and _" in refused(capsys, run, tmp_path / "o", "--tag", tag)
    assert "has no effect without --push" in refused(capsys, run, tmp_path / "o", "--private")
    line = refused(capsys, run, tmp_path / "o", "--data-dir", tmp_path / "none")
    assert line == f"data folder {tmp_path / 'none'} does not exist"
    assert main(["weights", "publish", str(run), "--out", str(tmp_path / "o")]) == 2
    assert "the following arguments are required: --license" in capsys.readouterr().err
    assert main(["weights", "download", "metala_nanno"]) == 2
    assert "did you mean metala_nano?" in capsys.readouterr().err
    assert main(["weights", "download", "resnet18"]) == 2
    assert "resnet18 is timm's" in capsys.readouterr().err
    assert main(["weights", "download", "lru_small"]) == 2
    assert "no weights for lru_small" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_full_disk_leaves_nothing(run, small_disk, capsys):
    assert "No space left" in refused(capsys, run, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_verify_tells_every_fault_and_goes_on(run, tmp_path, capsys):
    for name in ("good", "bad"):
        assert publish(run, tmp_path / name, "--tag", "digits") == 0
    path = tmp_path / "bad" / "metala_nano.digits" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("bad", "none", "good")]
    assert main(["weights", "verify", *folders]) == 1
    bad, none, good = capsys.readouterr().out.splitlines()
    assert "the manifest says" in bad and none.endswith("no such folder") and "ok" in good


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub
def test_a_published_folder_is_pushed_and_read_back(run, digit_tree, tmp_path, capsys, monkeypatch):
    """By the Hub's protocol, to a server on this machine that speaks it."""
    with serving(Uploads()) as hub:
        values = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": True}
        hub_constants(monkeypatch, hub.url, **values)
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        monkeypatch.setenv(source.HUB_VARIABLE, "owls")
        name = "owls/metala_nano.digits"
        assert publish(run, tmp_path / "out", "--tag", "digits", "--push", name) == 0
        assert f"{hub.url}/{name}\n" in capsys.readouterr().out
        assert {path for _, path in hub.committed} == {
            "README.md", "config.json", "config.yaml", "curve.png", "manifest.json",
            "metrics.jsonl", "model.safetensors",
        }  # fmt: skip
        folder = tmp_path / "out" / "metala_nano.digits"
        weights = (folder / "model.safetensors").read_bytes()
        assert hub.files[f"/{name}/resolve/main/model.safetensors"] == weights
        expected = scores(run / "last", digit_tree)
        for checkpoint in ("metala_nano.digits", f"hf-hub:{name}"):
            assert scores(checkpoint, digit_tree) == expected
        hub.allowed = False
        other = "owls/metala_nano.b"
        line = refused(capsys, run, tmp_path / "out", "--tag", "b", "--push", other)
        assert line.startswith(f"cannot publish {other}: ") and "401" in line
        hub.allowed = True
        assert main(["weights", "push", str(tmp_path / "out" / "metala_nano.b"), other]) == 0
        assert scores("metala_nano.b", digit_tree) == expected
        line = refused(capsys, run, tmp_path / "out", "--tag", "c", "--push", name)
        assert line.endswith("looked for in a repository of that name, owls/metala_nano.c")


def test_verify_without_names_is_of_what_ships(capsys):
    assert main(["weights", "verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(source.shipped().weights)
    assert all(": ok, " in line for line in lines)
