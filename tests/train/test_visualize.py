"""Pictures from the command line."""

import pytest
from PIL import Image

from metala_vision.cli import main


def test_every_scan_order_is_drawn(tmp_path, capsys):
    picture = tmp_path / "scans.png"
    assert main(["visualize", "scans", "--grid", "3", "5", "--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["scans", "--grid", "0", "5"], "--grid takes 1 to 256 rows and columns, got [0, 5]"),
        (["scans", "--grid", "a", "5"], "invalid int value: 'a'"),
        (["scans", "--out", "x.xyz"], "--out must end in one of .png .pdf .svg, got x.xyz"),
        (["scans", "--out", "noext"], "--out must end in one of .png .pdf .svg, got noext"),
        (["attention"], "invalid choice: 'attention'"),
        (["scans", "--out", "/sys/kernel/x.png"], "cannot write /sys/kernel/x.png: "),
    ],
)
def test_a_mistake_is_one_line(flags, message, capsys):
    assert main(["visualize", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
