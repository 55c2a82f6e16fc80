"""Adaptors of others' models: what is missing is named; with checkouts the models are theirs."""

import os
import subprocess
import sys

import pytest

from metala_vision.errors import UserError
from tests.benchmarks._load import BENCHMARKS, ROOT, load

peer_models = load("peer_models")
FOLDER = peer_models.FOLDER
# Million parameters: the papers' 6 and 7, and what DeiT-tiny's width and depth come to.
PARAMETERS = {"vig_tiny": 5.83, "vim_tiny": 7.15, "flazoo_gla": 5.80}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_missing_checkout_and_a_missing_package_are_named(name, monkeypatch, tmp_path):
    build = getattr(peer_models, name)
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(UserError, match=f"{FOLDER} must name the folder that holds a checkout of"):
        build(224)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(UserError, match=f"{FOLDER}={tmp_path} holds no checkout called"):
        build(224)
    (tmp_path / "theirs.py").write_text("import not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="ViG needs the package not_there, which is not installed"):
        peer_models.load("theirs", "ViG")
    with pytest.raises(UserError, match="the checkout of ViG has no module not_there"):
        peer_models.load("not_there", "ViG")


def test_two_libraries_of_one_name_are_refused(monkeypatch, tmp_path):
    library = type(sys)("fla")
    library.__file__ = str(tmp_path / "ViG/fla/__init__.py")
    refuse = peer_models.refuse_the_others_library
    refuse("ViG", tmp_path / "ViG", inside=True)
    monkeypatch.setitem(sys.modules, "fla", library)
    refuse("ViG", tmp_path / "ViG", inside=True)
    for name, root, inside in (("ViG", "other", True), ("fla-zoo", "ViG", False)):
        with pytest.raises(UserError, match=f"{name} needs a process of its own: .* is imported"):
            refuse(name, tmp_path / root, inside=inside)


def test_an_extension_that_cannot_be_built_is_named(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with pytest.raises(UserError, match="Vim needs not_there, and there is no nvcc to build it"):
        peer_models.extension("not_there", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(UserError, match="there is no GPU to build it for"):
        peer_models.extension("not_there", tmp_path)
    # a compiler that fails
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (tmp_path / "a.cu").touch()
    with pytest.raises(UserError, match="Vim's not_there does not build: "):
        peer_models.extension("not_there", tmp_path)
    # a build that was killed
    (tmp_path / "built/not_there/lock").touch()
    with pytest.raises(UserError, match=r"not_there/lock: not_there is being built, or its build"):
        peer_models.extension("not_there", tmp_path)


@pytest.mark.launch
@pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} names no folder of checkouts")
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_checkout_gives_its_model(name):
    code = (
        f"import peer_models\nmodel = peer_models.{name}(96)\n"
        f"model = peer_models.{name}(224)\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    paths = [str(BENCHMARKS), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True,
    )  # fmt: skip
    if "to build it" in done.stderr:  # Vim's extension
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)
