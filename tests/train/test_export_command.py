"""`export`: files that compute what the model does, without this package; and the guard's teeth."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from timm.models import save_for_hf

from metala_vision.cli import main
from metala_vision.errors import UserError
from metala_vision.evaluate import load_model
from metala_vision.export import artefact, proof, wanted
from tests.conftest import SMALL_MODEL

BLOCKED = "import sys; sys.modules['metala_vision'] = sys.modules['timm'] = None\n"


@pytest.fixture(scope="module")
def checkpoint(digit_tree, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "run"
    flags = ["--data-dir", str(digit_tree), "--run-dir", str(run_dir), *SMALL_MODEL, "--workers",
             "0", "--batch-size", "12", "--max-steps", "2", "--lr", "3e-3"]  # fmt: skip
    assert main(["train", *flags]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_dir / "last"


def saved(folder, name, **options):
    """A folder as a run leaves it, of a model with the weights it starts with."""
    torch.manual_seed(0)
    save_for_hf(
        timm.create_model(name, **options), folder, model_args=options, safe_serialization=True
    )
    return folder


def small(folder, name="metala_nano", **options):
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, **options}
    return saved(folder / name, name, **options)


def export(checkpoint, kind, out, *flags):
    given = [str(flag) for flag in flags]
    return main(["export", str(checkpoint), "--format", kind, "--out", str(out), *given])


def refused(capsys, checkpoint, kind, out, *flags):
    """The one line."""
    capsys.readouterr()
    assert export(checkpoint, kind, out, *flags) == 2
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert len(lines) == 1 and told.out == "", told
    return lines[0].removeprefix("metala-vision: error: ")


def without_the_package(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(checkpoint, digit_tree, tmp_path_factory):
    """A run's model as probabilities of images in [0, 1], checked with real ones."""
    out = tmp_path_factory.mktemp("out") / "digits.pt2"
    flags = ["--softmax", "--normalize", "--data-dir", digit_tree, "--max-images", "10"]
    assert export(checkpoint, "torch", out, *flags) == 0
    return out


def expected(checkpoint, images):
    """Probabilities for images in [0, 1], by the model as eval loads it."""
    model = load_model(str(checkpoint))
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        return model((images - mean) / std).softmax(1).numpy()


@pytest.mark.export
def test_a_run_as_a_file_that_needs_no_package(checkpoint, exported, tmp_path):
    images = torch.rand(3, 3, 32, 32)
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import json, numpy, torch\n"
        "extra = {'metadata.json': ''}\n"
        "model = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
        "x = torch.from_numpy(numpy.load(sys.argv[2]))\n"
        "numpy.save(sys.argv[3], model(x).detach().numpy())\n"
        "print(json.loads(extra['metadata.json'])['class_names'])"
    )
    made = tmp_path / "made.npy"
    told = without_the_package(code, exported, tmp_path / "images.npy", made)
    assert told == "['digit0', 'digit1', 'digit2']\n"
    np.testing.assert_allclose(np.load(made), expected(checkpoint, images), rtol=1e-5)


@pytest.mark.export
def test_what_lies_beside_it(exported):
    facts = json.loads(exported.with_name("digits.pt2.json").read_text())
    assert facts["file"] == {
        "name": "digits.pt2", "bytes": exported.stat().st_size,
        "sha256": hashlib.sha256(exported.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert facts["model"] == "metala_nano" and facts["class_names"] == [
        "digit0", "digit1", "digit2",
    ]  # fmt: skip
    given = facts["input"]
    assert given["shape"] == ["batch", 3, 32, 32] and given["range"] == "0 to 1"
    assert given["interpolation"] and given["crop_pct"] and len(given["mean"]) == 3
    assert facts["output"]["name"] == "probabilities"
    assert torch.__version__.startswith(facts["versions"]["torch"])
    found = facts["proof"]
    assert 0 < found["file"] <= found["allowed"] == pytest.approx(
        4 * max(found["eager"], 2**-23)
    )  # fmt: skip
    assert (found["images"], found["real"], found["same"]) == (18, 10, 18)
    assert sorted(p.name for p in exported.parent.iterdir()) == ["digits.pt2", "digits.pt2.json"]


@pytest.mark.export
def test_no_place_of_this_machine_is_in_it(exported):
    assert str(artefact.__file__).encode() not in exported.read_bytes()
    assert b"metala_vision/layers" not in exported.read_bytes()


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch.export.load
def test_what_is_told_of_a_model_of_timm(tmp_path, capsys):
    folder, out = (
        saved(tmp_path / "vit", "test_vit", num_classes=4, img_size=32),
        tmp_path / "v.pt2",
    )
    capsys.readouterr()
    assert export(folder, "torch", out, "--dynamic", "none", "--batch-size", "3") == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert told.err == "" and lines[-1] == str(out)
    assert lines[1] == "top-1 is eager's on 9 of 9 images, 0 of them real, the others noise"
    scope: dict = {}
    exec("\n".join(line.strip() for line in lines[-4:-1]), scope)
    assert scope["logits"].shape == (3, 4)
    assert refused(capsys, folder, "torch", out).endswith(" is there already; --replace writes o"
                                                          "ver it")  # fmt: skip


@pytest.mark.export
def test_a_file_of_other_weights_is_refused(checkpoint, exported):
    """One bias, moved by a hundred thousandth; with the right one it is the fixture's proof."""
    model = load_model(str(checkpoint))
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    case = proof.Case(images, (images - mean) / std, False)
    with torch.no_grad():
        model.head.fc.bias[1] += 1e-5
    with pytest.raises(UserError, match="the torch file is not the model: off by "):
        proof.prove("torch", exported, model, [case], "float32", True, True)


@pytest.mark.slow
@pytest.mark.export
def test_wrong_weights_in_the_file_leave_none(checkpoint, tmp_path, monkeypatch, capsys):
    """One bias, moved by a hundred thousandth: nothing is written."""
    write = artefact.write

    def tampered(kind, graph, *rest):
        graph.model.head.fc.bias.data[1] += 1e-5
        return write(kind, graph, *rest)

    monkeypatch.setattr(artefact, "write", tampered)
    line = refused(capsys, checkpoint, "torch", tmp_path / "x.pt2")
    assert line.startswith("the torch file is not the model: off by ")
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_load_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")

    def broken(kind, graph, example, shapes, output, path, *rest):
        path.write_bytes(b"no archive")

    monkeypatch.setattr(artefact, "write", broken)
    monkeypatch.setattr(wanted, "_check_onnx", lambda: None)
    line = refused(capsys, checkpoint, "onnx", tmp_path / "x.onnx")
    assert line.startswith("the onnx file does not run by itself: ") and "x." in line
    assert not list(tmp_path.iterdir())


def test_the_measure_of_an_error():
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    assert proof.relative(x, x) == 0
    assert proof.relative(x + torch.tensor([[0, 0], [0, 0.25]]), x) == pytest.approx(0.25)
    assert proof.relative(x[:1], x) == proof.relative(x * float("nan"), x) == float("inf")
    assert proof.relative(x, x * float("inf")) == float("inf")


MISTAKES = [
    (["--out", "x.onnx"], "--out must end in .pt2 for --format torch: x.onnx"),
    (["--format", "onnx", "--out", "x.pt2"], "--out must end in .onnx for --format onnx: x.pt2"),
    (["--format", "tflite"], "argument --format: invalid choice: 'tflite'"),
    (["--out", "/nowhere/x.pt2"], "cannot write /nowhere/x.pt2: No such folder"),
    (["--img-size", "0"], "--img-size needs 1 or more, got 0"),
    (["--img-size", "1", "2", "3"], "--img-size takes one or two numbers, got 3"),
    (["--batch-size", "2"], "--batch-size is for --dynamic none; else any batch is taken"),
    (["--batch-size", "0", "--dynamic", "none"], "--batch-size needs 1 or more, got 0"),
    (["--opset", "18"], "--opset is for --format onnx, not torch"),
    (["--format", "onnx", "--out", "x.onnx", "--opset", "9"], "--opset takes 18 to 23, got 9"),
    (["--format", "onnx", "--out", "x.onnx", "--dtype", "bfloat16"], "--dtype bfloat16 cannot be"),
    (["--max-images", "0"], "--max-images needs 1 or more, got 0"),
    (["--data-dir", "/nowhere"], "data folder /nowhere does not exist"),
    (["--images", "/nowhere.png"], "image /nowhere.png does not exist"),
    (["--model-kwargs", "img_size=3"], "--model-kwargs takes no img_size; --img-size and --dtype"),
    (["--img-size", "33"], "cannot load metala_nano: img_size=(33, 33) must be a multiple of"),
    (["--softmax", "--model-kwargs", "num_classes=0"], "--softmax: metala_nano has no classes"),
    (["--dynamic", "size", "--model-kwargs", "scans=hilbert"], "--dynamic size: the scan hilbert"),
    (["--dynamic", "size", "--img-size", "32"], "--dynamic size needs 32 patches and two a side"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda x: str(x)[:40])
def test_a_mistake_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wanted, "_check_onnx", lambda: None)
    given = ["export", "metala_nano", "--format", "torch", "--out", "x.pt2", *flags]
    assert main(given) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"metala-vision: error: {message}") and told.err.count("\n") == 1
    assert told.out == "" and not list(tmp_path.iterdir())


def test_what_is_no_checkpoint(tmp_path, capsys):
    out = tmp_path / "x.pt2"
    line = refused(capsys, "metala_nanno", "torch", out)
    assert line.startswith("'metala_nanno' is no folder with a checkpoint and no timm model; did")
    line = refused(capsys, "lru_nano", "torch", out)
    assert line.startswith("cannot load lru_nano: ") or "no weights for lru_nano" in line
    vit = saved(tmp_path / "vit", "test_vit", num_classes=4, img_size=32)
    line = refused(capsys, vit, "torch", out, "--dynamic", "size")
    assert line.startswith("--dynamic size is for models of this package, ")
    assert not out.exists()


def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = refused(capsys, "metala_nano", "onnx", tmp_path / "x.onnx")
    assert line == "--format onnx needs onnxscript: pip install 'metala-vision[export]'"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    line = refused(capsys, "metala_nano", "aoti", tmp_path / "x.pt2")
    assert line.startswith("--format aoti needs a C++ compiler, ")


@pytest.mark.export
def test_onnx_for_any_size_with_what_it_needs_inside(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, out = small(tmp_path, depth=1), tmp_path / "x.onnx"
    capsys.readouterr()
    flags = ["--dynamic", "size", "--softmax", "--normalize"]
    assert export(folder, "onnx", out, *flags) == 0
    told = capsys.readouterr()
    assert told.err == "" and told.out.splitlines()[-1] == str(out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    images = torch.rand(2, 3, 72, 88)
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, expected(folder, images), rtol=1e-5)
    inside = session.get_modelmeta().custom_metadata_map
    facts = json.loads(out.with_name("x.onnx.json").read_text())
    assert json.loads(inside["input"]) == facts["input"] and inside["model"] == "metala_nano"
    assert facts["opset"] >= 18 and b"metala_vision/" not in out.read_bytes()


@pytest.mark.export
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "onnx", "aoti"])
@pytest.mark.parametrize("name", ["metala", "lru", "mamba", "hgrn", "retnet", "deit"])
def test_every_kind_of_model_in_every_format(name, kind, tmp_path, capsys):
    if name == "deit":
        folder = saved(tmp_path / "vit", "test_vit", num_classes=4, img_size=32)
    else:
        folder = small(tmp_path, f"{name}_nano")
    capsys.readouterr()
    out = tmp_path / f"x{wanted.SUFFIXES[kind]}"
    assert export(folder, kind, out) == 0
    told = capsys.readouterr()
    assert told.err == "" and "top-1 is eager's on 8 of 8" in told.out


@pytest.mark.export
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "onnx", "aoti"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype, kind, tmp_path, capsys):
    if (dtype, kind) == ("bfloat16", "onnx"):
        pytest.skip("onnxruntime has no bfloat16 on a CPU; refused")
    out = tmp_path / f"x{wanted.SUFFIXES[kind]}"
    assert export(small(tmp_path), kind, out, "--dtype", dtype) == 0
    facts = json.loads(out.with_name(f"{out.name}.json").read_text())["proof"]
    assert 1e-4 < facts["eager"] < 2e-2 and facts["file"] <= 2 * facts["eager"]
