"""Who may import whom, triton stays optional, and the guard of the kernels folder."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "metala_vision"
# Each layer may import itself and those before it.
ORDER = ("kernels", "layers", "weights", "models", "training")
# Beside the standard library and torch, what a layer may use.
DOWNLOADS = {"filelock", "huggingface_hub", "pydantic", "safetensors", "tqdm", "typing_extensions"}
LIBRARIES = {"kernels": set(), "layers": {"timm"}, "weights": DOWNLOADS, "models": {"timm"}}
LEAVES = ("_version", "errors")  # that import nothing of ours


def modules():
    """{dotted name: path} of the package, the kernels where they really are."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder).with_suffix("")
            if folder.name == PACKAGE and relative.parts[0] == "kernels":
                continue
            parts = [p for p in relative.parts if p != "__init__"]
            found[".".join([prefix, *parts])] = path
    return found


def layer(module):
    """The layer of a dotted name; None for the leaves, and the package, which registers models."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in LEAVES:
        return None
    return parts[1] if parts[1] in ORDER else "training"


def imports(source, module, is_package):
    """Dotted names that a module's source imports, relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            names |= {base} if base != PACKAGE else {f"{base}.{a.name}" for a in node.names}
    return names


def may_import_triton(module):
    """The kernels themselves, and what imports them when a call needs one."""
    name = module.split(".")[-1]
    return layer(module) == "kernels" and (
        name.startswith(("triton_", "_triton")) or name in ("fused", "_fused")
    )


def violations(source, module, is_package=False):
    """Imports of this module that its layer may not make."""
    own = layer(module)
    bad = []
    for name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top == "triton" and may_import_triton(module):
            continue
        if top == PACKAGE:
            other = layer(name)
            if own and other and ORDER.index(other) > ORDER.index(own):
                bad.append(name)
        elif own in LIBRARIES and top not in sys.stdlib_module_names | {"torch"} | LIBRARIES[own]:
            bad.append(name)
    return bad


def test_imports_go_one_way():
    found = modules()
    assert len(found) > 15
    for name in LEAVES:
        names = imports(found[f"{PACKAGE}.{name}"].read_text(), f"{PACKAGE}.{name}", False)
        assert {top.split(".")[0] for top in names} <= sys.stdlib_module_names, name
    for module, path in found.items():
        bad = violations(path.read_text(), module, path.name == "__init__.py")
        assert not bad, f"{module} imports {bad}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metala_vision.kernels.x.api", "import timm"),
        ("metala_vision.kernels.x.api", "from metala_vision.layers import Block"),
        ("metala_vision.kernels.x.api", "import numpy"),
        ("metala_vision.kernels.x.api", "import triton"),
        ("metala_vision.kernels.x.fused", "import numpy"),
        ("metala_vision.layers.x", "from metala_vision.models.backbone import Backbone"),
        ("metala_vision.layers.x", "from ..models import backbone"),
        ("metala_vision.models.x", "from metala_vision.train import train"),
        ("metala_vision.models.x", "def f():\n    from metala_vision import data"),
        ("metala_vision.models.x", "import accelerate"),
        ("metala_vision.layers.x", "from metala_vision import weights"),
        ("metala_vision.weights.x", "from metala_vision.models import list_models"),
        ("metala_vision.weights.x", "import timm"),
    ],
)
def test_the_order_is_noticed_when_broken(module, source):
    assert violations(source, module)


def test_the_definition_and_the_portable_form_know_neither_triton_nor_each_other():
    portable = {f"{PACKAGE}.kernels.gated_linear_attention.{name}" for name in ("chunked", "pairs")}
    portable |= {f"{PACKAGE}.kernels.gated_norm.portable", f"{PACKAGE}.kernels._portable"}
    portable |= {f"{PACKAGE}.kernels.linear_recurrence.chunked"}
    for module, path in modules().items():
        names = imports(path.read_text(), module, False)
        if module.endswith(".reference"):
            assert {name.split(".")[0] for name in names} == {"torch"}, module
        if module in portable:
            ours = {name for name in names if name.startswith(PACKAGE)}
            assert ours <= portable, module
            others = {name.split(".")[0] for name in names - ours}
            assert others <= {"torch", "functools", "math"}, module


def python(code, folder):
    """Run code in a fresh interpreter from a folder, without the test's own import path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.launch
def test_every_module_imports_with_triton_blocked():
    names = sorted(
        name for name in modules() if not name.split(".")[-1].lstrip("_").startswith("triton")
    )
    assert len(names) > 15
    code = (
        "import sys, importlib; sys.modules['triton'] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "import timm, torch\n"
        "model = timm.create_model('metala_nano', num_classes=3).eval()\n"
        "assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)"
    )
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr


def test_the_bare_name_of_the_kernels_folder_is_refused():
    done = python("import kernels", ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "import it as 'metala_vision.kernels'" in done.stderr


@pytest.mark.launch
def test_the_import_registers_the_models_and_no_name_stands_in_timm_before():
    code = (
        "import timm\n"
        "before = set(timm.list_models()), set(timm.list_modules())\n"
        "import metala_vision\n"
        "ours = set(timm.list_models()) - before[0]\n"
        "assert 'metala_tiny' in ours and ours == set(metala_vision.list_models())\n"
        "new = set(timm.list_modules()) - before[1]\n"
        "assert new == set(metala_vision.models.FAMILIES), new\n"
        "print(metala_vision.__version__)"
    )
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr


def test_no_source_file_is_too_long_to_read_at_once():
    for module, path in modules().items():
        limit = 600 if layer(module) == "kernels" else 400
        assert len(path.read_text().splitlines()) <= limit, module
