"""The wheel holds what a checkout holds: kernels and configurations too."""

import re
import zipfile
from pathlib import Path

import pytest

from tests._wheel import build_wheel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("build"))


def test_the_wheel_holds_every_module_and_configuration_once(wheel):
    expected = {"metala_vision/py.typed"}
    for folder, inside in (("metala_vision", ""), ("kernels", "kernels/"), ("configs", "configs/")):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder).as_posix()
            through_link = folder == "metala_vision" and relative.startswith(("kernels", "configs"))
            held = path.suffix in (".py", ".yaml", ".html") or relative.startswith("weights/")
            hidden = path.is_dir() or "__pycache__" in path.parts or path.name.startswith(".")
            if held and not through_link and not hidden:
                expected.add(f"metala_vision/{inside}{relative}")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected)


def test_the_wheel_carries_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = {n.split(".dist-info/")[1]: n for n in archive.namelist() if ".dist-info/" in n}
        assert "licenses/LICENSE" in info
        assert (
            "metala-vision = metala_vision.cli:entry_point"
            in archive.read(info["entry_points.txt"]).decode()
        )


def test_the_lowest_constraints_are_the_declared_lower_bounds():
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.split("dependencies = [")[1].split("]")[0]
    declared = {"==".join(pair) for pair in re.findall(r'"([a-z0-9-]+)>=([0-9.]+)', listed)}
    lowest = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    assert declared == {line for line in lowest if not line.startswith("#")}
