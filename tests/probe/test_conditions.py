"""`metala-vision probe conditions`: what it measures, what it says, and what it refuses."""

import argparse
import json
import math

import pytest
import torch
from PIL import Image

from metala_vision.errors import UserError
from metala_vision.models import FAMILIES
from metala_vision.probe import conditions
from metala_vision.probe.conditions import MARK, dynamics, model_dynamics, verdicts
from metala_vision.probe.conditions_rows import Row
from metala_vision.probe.conditions_table import (
    BOUNDS,
    PAPER,
    WORDS,
    as_markdown,
    decays_table,
    parameters_table,
)
from metala_vision.probe.fit import MIXERS, Fit
from metala_vision.probe.systems import OPTIONS, registered, tokens
from tests.train._runs import ROOT


def probe(*argv):
    parser = argparse.ArgumentParser()
    conditions.add_arguments(parser)
    return conditions.run(parser.parse_args([str(arg) for arg in argv]))


def test_no_mixer_is_forgotten():
    names = {system.name for system in registered("nano")}
    assert set(MIXERS) == names == set(BOUNDS) and set(PAPER) <= names
    assert names <= {*FAMILIES, *OPTIONS}


def test_a_quick_measurement_is_told_and_written(tmp_path, capsys):
    document = tmp_path / "a.md"
    document.write_text(f"before\n\n<!-- {MARK} -->\n<!-- end -->\nafter\n")
    out, numbers = tmp_path / "out.md", tmp_path / "out.json"
    assert probe("--quick", "--mixers", "metala", "lru", "--model", "metala_nano",
                 "--out", out, "--json", numbers, "--update", document) == 0  # fmt: skip
    told = capsys.readouterr().out.strip()
    assert told in out.read_text() and told in document.read_text()
    text = document.read_text()
    assert text.startswith("before") and text.endswith("<!-- end -->\nafter\n")
    assert "--mixers metala lru --model metala_nano --quick`, commit " in text
    found = json.loads(numbers.read_text())
    metala, lru = found["mixers"]
    assert (metala["has"], lru["has"]) == ([True, False, True], [False, False, False])
    assert lru["dynamics"]["spread"] == 0 < metala["dynamics"]["spread"]
    assert [own["K"] for own in metala["fits"]] == [1, 8] and [f["K"] for f in lru["fits"]] == [1]
    assert 0 < metala["fits"][1]["error"][0] < metala["fits"][0]["error"][0] < 1
    assert found["models"][0]["spread"] > metala["dynamics"]["spread"]  # it was trained


def test_dynamics_of_known_decays():
    retnet, lru = registered("nano", ["lru", "retnet"])[::-1]
    maps = [[tokens(128, 4, seed)] for seed in range(2)]
    found = dynamics("retnet", [retnet], maps)
    assert (found.changes, found.spread) == (False, 0.0)
    known = [math.log(2) / -math.log1p(-(2.0 ** (-5 - h))) for h in range(2)]
    assert found.half_lives == pytest.approx([known[0], known[0], known[1]])
    assert dynamics("lru", [lru], maps).spread == 0
    (metala,) = registered("nano", ["metala"])
    # one channel in which log alpha is known: a standard normal token, weighed
    with torch.no_grad():
        metala.mixer.in_proj.weight[64:128] = 0
    assert dynamics("metala", [metala], maps).spread == 0
    with torch.no_grad():
        metala.mixer.in_proj.weight[64, 0] = 1.0
    metala.instance.conv = torch.nn.Identity()
    found = dynamics("metala", [metala], maps)
    gate = torch.cat([x[0].flatten(0, 2)[:, 0] for x in maps])
    log_alpha = torch.nn.functional.logsigmoid(gate) / 16
    spread = log_alpha.std(unbiased=False) / log_alpha.mean().abs()
    assert found.spread == pytest.approx(spread.item() / 64)  # of 64 channels, the others still
    assert found.changes and found.half_lives[1] == pytest.approx(16)


def test_linear_attention_never_forgets():
    (system,) = registered("nano", ["linear_attention"])
    found = dynamics("linear_attention", [system], [[tokens(128, 2)]])
    assert found.half_lives == [None] * 3 and not found.changes and found.spread == 0


def test_a_model_sees_images(tmp_path):
    draws = torch.Generator().manual_seed(0)
    for i in range(3):
        pixels = torch.randint(0, 255, (64, 64, 3), generator=draws, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    found = model_dynamics("metala_nano", [tmp_path], 2)
    assert found != model_dynamics("metala_nano", [], 2) and found.spread > 0
    with pytest.raises(UserError, match="attention_nano"):
        model_dynamics("attention_nano", [], 1)


def fits(*errors):
    return [Fit("x", 2**i, [error], [error]) for i, error in enumerate(errors)]


@pytest.mark.parametrize(
    ("has", "found", "sizes", "expected"),
    [
        ((True, False, True), fits(0.5, 0.01), (1, 32), (True, True, True)),
        ((True, True, True), fits(0.5, 0.01), (1, 32), (True, True, False)),
        ((True, True, False), fits(0.5, 0.01), (1, 32), (False, True, None)),
        ((False, False, True), fits(0.7), (1, 32), (True, False, None)),
        ((True, False, True), fits(0.7), (1, 8), (True, None, None)),
    ],
)
def test_verdicts(has, found, sizes, expected):
    assert verdicts(has, found, sizes) == expected


def row(name, has, verdict):
    (system,) = registered("nano", ["lru"])
    own = dynamics(name, [system], [[tokens(128, 2)]])
    cost = dict.fromkeys(("query", "key", "value", "decay", "gate", "out"), 0.5)
    return Row(name, own, fits(0.5), has, cost, verdict)


def test_what_is_not_as_the_paper_has_it_is_said():
    has = (True, False, True)
    agreed = as_markdown([row("metala", has, (True, True, True))])
    assert "Nothing measured is other than the paper has it" in agreed
    other = as_markdown(
        [row("gla", has, (True, True, True)), row("hgrn2", has, (True, True, True))]
    )
    assert "Not as the paper has it: gla, least parameters: measured yes, the paper no." in other
    assert "meets all three too: hgrn2." in other and "Nothing measured" not in other


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mixers", "metalla"], "'metalla' is none of metala, .*; did you mean metala"),
        (["--mixers", "lru", "lru"], "--mixers: lru is given twice"),
        (["--steps", "0"], "--steps needs 1 or more, got 0"),
        (["--targets", "0"], "--targets needs 1 or more, got 0"),
        (["--max-images", "-1"], "--max-images needs 1 or more, got -1"),
        (["--image", "a.png"], "--image is what --model sees; name one"),
        (["--quick", "--steps", "500"], "--quick sets --steps; give one of them"),
        (["--quick", "--targets", "2"], "--quick sets --targets; give one of them"),
        (["--model", "metala_nano", "--max-images", "3"], "--max-images is of --image; name one"),
        (["--out", "nowhere/a.md"], "cannot write nowhere/a.md"),
        (["--out", "README.md", "--json", "README.md"], "--json README.md is --out too"),
        (["--update", "README.md"], f"README.md has no line <!-- {MARK} -->"),
        (["--model", "no_such_model", "--quick"], "'no_such_model' is no folder with a checkpoint"),
        (["--model", "metala_nano", "--image", "nowhere.png"], "image nowhere.png does not exist"),
    ],
)
def test_a_mistake_is_one_line(argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as error:
        probe(*argv)
    assert "\n" not in str(error.value)


def test_the_documents_block_names_command_and_commit():
    block = (ROOT / "docs" / "unified.md").read_text().split(f"<!-- {MARK} -->")[1]
    assert f"\n`{MARK}" in block and "commit " in block
    for name in MIXERS:
        assert f"\n| {name} | " in block


def test_the_documents_block_is_what_is_measured():
    """All but the fits, which take minutes: decays, parameters, what a mixer has."""
    block = (ROOT / "docs" / "unified.md").read_text().split(f"<!-- {MARK} -->")[1]
    rows = conditions.measure(list(MIXERS), (), 0, 0)
    for name, has in ((row.name, row.has) for row in rows):
        assert f"\n| {name} | {' | '.join(WORDS[own] for own in has)} | " in block
    tables = (decays_table(rows, []), parameters_table(rows))
    for line in "\n".join(tables).splitlines():
        assert f"\n{line}\n" in block, line
