"""The table of docs/unified.md, and what it counts."""

import argparse

import pytest
import timm
import torch

from metala_vision.errors import UserError
from metala_vision.probe import systems, unified
from metala_vision.probe.conditions import dynamics
from metala_vision.probe.systems import classes, parameters, registered, state_floats
from tests.train._runs import ROOT

DOC = ROOT / "docs" / "unified.md"


def probe(*argv):
    parser = argparse.ArgumentParser()
    unified.add_arguments(parser)
    return unified.run(parser.parse_args([str(arg) for arg in argv]))


def test_the_document_holds_what_the_generator_writes(tmp_path, capsys):
    copy = tmp_path / "unified.md"
    stale = DOC.read_text().replace("| 4.01 | yes |", "| 4.02 | yes |")
    assert stale != DOC.read_text()
    copy.write_text(stale)
    assert probe("--update", copy) == 0
    assert copy.read_text() == DOC.read_text()
    assert capsys.readouterr().out.strip() in DOC.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read .*: No such file"), ("no marks", "has no line <!-- metala-vision probe"),
     ("<!-- end -->\n<!-- metala-vision probe unified -->\n", "with a line <!-- end --> below it"),
     (b"\xff", "no text")],
    ids=str,
)  # fmt: skip
def test_a_file_without_marks_is_named(tmp_path, text, message):
    path = tmp_path / "a.md"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        probe("--update", path)


def test_parameters_by_function_are_those_of_the_equations():
    """C = 128, R = 8, M = 16, two passes of Mamba; every parameter once."""
    C = 128
    expected = {
        "metala": {"query": C * C // 2, "key": 0, "value": C * C, "decay": C * C // 2,
                   "gate": C * C + C, "out": C * C + C // 2, "conv": 9 * C},
        "gla": {"query": C * C // 2, "key": C * C // 2, "value": C * C, "gate": C * C + C,
                "decay": 16 * C + 16 * (C // 2) + C // 2, "out": C * C, "conv": 9 * C},
        "lru": {"query": 0, "key": 0, "value": 2 * C * C + C, "decay": 2 * C, "gate": 0,
                "out": 4 * C * C + C, "conv": 9 * C},
        "mamba": {"query": 2 * 32 * C, "key": 2 * 32 * C, "value": 2 * C * C, "gate": 2 * C * C,
                  "decay": 2 * (2 * 16 * C + 2 * C + 32 * C), "out": 2 * C * C + 4 * C,
                  "conv": 2 * 20 * C},
    }  # fmt: skip
    found = registered("nano", list(expected))
    assert [system.name for system in found] == list(expected)
    for system in found:
        assert parameters(system) == expected[system.name]
        assert sum(expected[system.name].values()) == sum(
            p.numel() for p in system.mixer.parameters()
        )


def test_classes_and_states_of_known_systems():
    known = {
        "metala": ((True, False, True), 128 * 128 // 4),
        "lru": ((False, False, False), 2 * 128),
        "linear_attention": ((True, True, False), 128 * 64 + 128),
    }
    for system in registered("nano", list(known)):
        assert (classes(system), state_floats(system)) == known[system.name]


def test_a_key_of_its_own_and_a_decay_that_stands_still_are_seen():
    (system,) = registered("nano", ["metala"])
    right = system.instance.key
    system.instance.replace(key=lambda x, way: right(x, way) * (1 + 1e-6))
    assert classes(system) == (True, True, True)
    with torch.no_grad():
        system.mixer.in_proj.weight[64:128] = 0
    assert classes(system)[2] is False


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_a_running_maximum_is_no_memory(direction):
    """Gates that stand still: ln 2 / -log F tokens, whatever the keys of ReGLA are."""
    model = timm.create_model("regla_nano", depth=1, num_classes=0, direction=direction)
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight[3 * 128 :] = 0
    found = dynamics("regla", systems.systems_of("regla", model), [[systems.tokens(128)]])
    assert found.spread == 0 and not found.changes
    assert found.half_lives == pytest.approx([1.0] * 3)  # F of 1/2 and 1/2 is 1/2


def test_every_family_that_is_an_instance_is_in_the_table():
    table = DOC.read_text()
    names = {type(s.mixer) for s in registered("nano")}
    assert names == set(systems.INSTANCES)
    assert all(f"\n| {system.name} | " in table for system in registered("nano"))
