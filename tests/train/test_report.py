"""The report and the pictures of a comparison, from rows made up here."""

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from PIL import Image

from metala_vision.compare import CompareConfig, Row, as_markdown
from metala_vision.compare.estimates import Estimate, estimate
from metala_vision.compare.pictures import Curve, curve_of, draw_curves, draw_panels, known
from metala_vision.compare.published import PUBLISHED, Published
from metala_vision.compare.report import as_html, write_report
from metala_vision.compare.table import as_csv, cells
from metala_vision.plots import style

PUBLIC = Published(75.33, "a paper, table 6")


def made_up():
    """A measured row, one of one seed, one that failed."""
    first = Row(
        "metala_nano", "metala_nano", 1_872_744, 0.2345, estimate([22.5, 23.5, 24.0]),
        Estimate(48.5, 0.25, 3), 123.4, 567.8, 910.0, 4200, 12.34, 1, PUBLIC,
    )  # fmt: skip
    second = Row("deit", "deit_tiny_patch16_224", 5_000_000, 2.5, Estimate(20.0, None, 1))
    failed = Row("<b>", "gla_nano", errors=["seed 0: a < b & 'c' \"d\""])
    return [first, second, failed]


def comparison():
    return CompareConfig.model_validate({
        "recipe": "quickstart",
        "members": [
            "metala_nano", {"name": "deit", "model": "deit_tiny_patch16_224"},
            {"name": "other", "model": "gla_nano", "settings": {"optim.lr": 0.125}},
        ],
        "differs": ["optim.lr"],
    })  # fmt: skip


CURVES = [
    Curve("metala_nano", 0, [(10, 2.5), (20, 1.25)], [(10, 11.5), (20, 22.5)]),
    Curve("deit", 0, [(10, 2.25)], []),
]


class Page(HTMLParser):
    """Its text, the addresses in it, and that what is opened is closed."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.pictures, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values[k] for k in ("src", "href", "action") if k in values]
        if tag == "img":
            self.pictures.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def test_the_report_stands_alone_and_holds_every_number_as_text():
    rows = made_up()
    page = Page(as_html(comparison(), rows, CURVES, {"commit": "abc"}, "A & B"))
    assert not page.open
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    text = "\n".join(page.text)
    for row in rows:
        for cell in cells(row, rows):
            assert cell in text
    for number in ("2.5000", "1.2500", "11.50", "22.50", "2.2500"):
        assert number in text
    assert "A & B" in text and "abc" in text and "a paper, table 6" in text
    assert "lr: 0.125" in text and "optim.lr" in text
    assert "<b> failed: seed 0: a < b & 'c' \"d\"" in text  # escaped, so that it is read as text
    described = " ".join(picture["alt"] for picture in page.pictures)
    assert "metala_nano 123" in described and "deit 2.5" in described


def test_the_pictures_in_the_report_are_whole():
    page = Page(as_html(comparison(), made_up(), CURVES, {}, "title"))
    assert len(page.pictures) == 6  # five panels and the curves
    for picture in page.pictures:
        root = ElementTree.fromstring(base64.b64decode(picture["src"].split(",")[1]))
        assert root.tag.endswith("svg") and "viewBox" in root.attrib


def test_a_comparison_of_which_nothing_is_known_has_a_report(tmp_path):
    rows = [Row("a", "metala_nano", errors=["seed 0: no"]), Row("b", "gla_nano")]
    write_report(comparison(), rows, tmp_path, "title")
    assert "a failed: seed 0: no" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "compare.png").exists() and known(rows) == []


@pytest.mark.parametrize("count", [1, 3, 12])
def test_pictures_of_few_and_many_members(count, tmp_path):
    rows = [
        Row(f"model_{i}", "metala_nano", top1=estimate([i, i + 1.0]), train_img_s=10.0 * i)
        for i in range(count)
    ]  # fmt: skip
    draw_panels(rows, tmp_path / "panels.png")
    curves = [Curve(row.name, 0, [(1, 2.0), (2, 1.0)], [(1, 5.0), (2, 9.0)]) for row in rows]
    draw_curves(curves, rows, tmp_path / "curves.png")
    for name in ("panels.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_members_look_different():
    looks = [tuple(style(i).values()) for i in range(28)]
    assert len(set(looks)) == 28
    assert len({look[:2] for look in looks[:7]}) == 7


def test_a_curve_is_the_mean_of_each_part_of_a_run():
    lines = [{"event": "train", "step": i, "loss": float(i)} for i in range(1, 101)]
    lines += [{"event": "train", "step": 101, "loss": None}]
    lines += [{"event": "eval", "step": 100, "top1": 7.0}]
    curve = curve_of("a", 0, lines)
    assert curve.loss == [(5 * i, 5 * i - 2.0) for i in range(1, 21)]
    assert curve.top1 == [(100, 7.0)]


def test_tables_as_text():
    rows = made_up()
    table = as_markdown(rows)
    lines = table.splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "| metala_nano | 23.33 ± 1.90 | 48.50 ± 0.25 | 1 | 1,872,744 | 0.234 |" in lines[2]
    assert "20.00 (n/a)" in lines[3] and "75.33 [1]" in lines[2]
    assert "[1] a paper, table 6" in table
    assert re.search(r"^<b> failed: seed 0: a < b", table, re.MULTILINE)
    assert as_csv(rows).count("\r\n") == 4 and "0.2345" in as_csv(rows)


def test_published_figures_name_their_source():
    for model, (top1, source) in PUBLISHED.items():
        assert 60 < top1 < 90 and "arXiv" in source and "Table" in source, model
