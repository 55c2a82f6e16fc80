"""Every family scripted and compiled; exports are in test_export.py."""

import subprocess
import sys

import pytest
import timm
import torch

from tests._numerics import SAME, relative_rms
from tests.models.test_backbone import NANO, small

# Those over MetaLA's operator are compiled as it is; a process compiles one in ten seconds.
# A compiler runs for ours alone, unless the slow tests are asked for.
COMPILED = [pytest.param(n, marks=[] if n == "metala_nano" else [pytest.mark.slow]) for n in NANO]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """torch.compile keeps eight versions of one forward; every family's is the backbone's."""
    torch.compiler.reset()


@pytest.mark.parametrize("name", [*NANO, "metala_tiny_paper"])
def test_compiles_without_a_graph_break(name):
    model = timm.create_model(name, depth=2, num_classes=3)
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)  # EVA draws noise in training
    expected = model(x)
    torch.manual_seed(0)
    actual = compiled(x)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_saved_scripts_run_without_the_package(tmp_path):
    for name in NANO:
        model = small(name).eval()
        x = torch.randn(1, 3, 64, 64)
        torch.jit.script(model).save(str(tmp_path / f"{name}.pt"))
        torch.save((x, model(x).detach()), tmp_path / f"{name}.pair")
    # not bit-equal: eager Python takes the anchor, a script the tree
    code = (
        "import pathlib, sys, warnings, torch; warnings.simplefilter('ignore')\n"
        "for path in pathlib.Path().glob('*.pt'):\n"
        "    x, expected = torch.load(path.with_suffix('.pair'))\n"
        "    error = (torch.jit.load(str(path))(x) - expected).norm()\n"
        f"    assert error <= {SAME} * expected.norm(), path\n"
        "    print(path.stem)\n"
        "assert not any(name.startswith(('metala_vision', 'timm')) for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(NANO)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_gives_the_same_numbers(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 64, 64)
    assert relative_rms(torch.jit.script(model)(x), model(x)) <= SAME  # the tree, the anchor


@pytest.mark.export
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", COMPILED)
def test_one_layer_trains_compiled(name):
    """By Inductor, which has its own ideas of how to fuse a backward pass."""
    # Inductor draws EVA's noise in a way of its own
    quiet = {"noise": False} if name == "eva_attention_nano" else {}
    model = timm.create_model(name, depth=1, num_classes=3, **quiet)
    x = torch.randn(2, 3, 64, 64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()),
                                   allow_unused=True)  # fmt: skip
    found = torch.autograd.grad(
        torch.compile(model, fullgraph=True)(x).square().sum(), list(model.parameters()),
        allow_unused=True,
    )  # fmt: skip
    for ours, eager in zip(found, expected, strict=True):
        assert eager is None or relative_rms(ours, eager) <= 1e-4
