"""A manifest is not believed, nor is a file because of its name."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from metala_vision.errors import WeightsError
from metala_vision.models.pretrained import CLASSIFIER, FIRST_CONV
from metala_vision.weights.check import (
    FIRST,
    HEAD,
    LARGEST_HEADER,
    check_file,
    check_tensors,
    sha256_of,
)
from metala_vision.weights.manifest import Entry, Manifest, as_json, parse_manifest

ENTRY = {
    "file": "metala_nano.some/model.safetensors", "size": 10, "sha256": "0" * 64,
    "dataset": "digits", "recipe": "quickstart", "license": "apache-2.0", "num_classes": 2,
    "metrics": {"top1": 50.0, "top5": 100.0, "images": 4},
    "preprocessing": {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 1.0,
                      "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3},
    "label_names": ["a [x\\n", "b"],
}  # fmt: skip


def text_of(**changes):
    return json.dumps({"format": 1, "weights": {"metala_nano.some": {**ENTRY, **changes}}})


def test_it_reads_what_it_writes_and_what_a_later_version_adds():
    manifest = parse_manifest(text_of(later={"a": 1}), "here")
    assert manifest.tags("metala_nano") == ["some"] and manifest.tags("metala_tiny") == []
    assert parse_manifest(as_json(manifest), "here") == manifest
    assert manifest.weights["metala_nano.some"].label_names == ("a [x\\n", "b")


@given(names=st.lists(st.text(), min_size=2, max_size=2), words=st.text())
def test_any_words_survive(names, words):
    entry = Entry.model_validate({**ENTRY, "label_names": names, "dataset": words})
    manifest = Manifest(weights={"metala_nano.some": entry})
    assert parse_manifest(as_json(manifest), "here") == manifest


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "a/../model.safetensors", "/etc/model.safetensors", "a//b.safetensors",
     "C:/x.safetensors", "a\\b.safetensors", ".hidden/x.safetensors", "./x.safetensors",
     "http://x/y.safetensors", "~/x.safetensors", "a/b.safetensors/", "", "%2e%2e/x.safetensors",
     "x\n.safetensors", "model.bin", "model.pth", "model.pkl", "model.safetensors.zip",
     "x.safetensors\x00.bin", "a" * 300 + ".safetensors"],
)  # fmt: skip
def test_a_file_is_a_plain_name_of_a_safetensors_file(file):
    with pytest.raises(WeightsError, match=r"^here is no manifest of weights: weights.metala_nano"):
        parse_manifest(text_of(file=file), "here")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sha256": "0" * 63}, "sha256"), ({"sha256": "G" * 64}, "sha256"), ({"size": 0}, "size"),
        ({"size": 2**50}, "size"), ({"size": "many"}, "size"), ({"license": None}, "license"),
        ({"num_classes": 3}, "2 label_names"),
        ({"metrics": {"top1": 101, "top5": 1, "images": 1}}, "top1"),
        ({"preprocessing": {**ENTRY["preprocessing"], "mean": [0.5]}}, "a value for each channel"),
        ({"preprocessing": {**ENTRY["preprocessing"], "crop_pct": 0}}, "crop_pct"),
        ({"preprocessing": {**ENTRY["preprocessing"], "input_size": [3, 64]}}, "input_size"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_named(changes, what):
    with pytest.raises(WeightsError, match=what):
        parse_manifest(text_of(**changes), "here")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 2, "weights": {}}', '{"weights": {"../x": {}}}',
     '{"weights": {"metala_nano": {}}}', '{"weights": []}', b"\xff\xfe", "[" * 100_000],
    ids=range(10),
)  # fmt: skip
def test_another_text_is_one_line(text):
    with pytest.raises(WeightsError, match=r"^here is no manifest of weights: ") as caught:
        parse_manifest(text, "here")
    assert "\n" not in str(caught.value)


def test_size_and_sha256_are_those_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"0123456789")
    entry = Entry.model_validate({**ENTRY, "sha256": sha256_of(path)})
    assert sha256_of(path) == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    check_file(path, entry)
    path.write_bytes(b"012345678")
    with pytest.raises(WeightsError, match="has 9 bytes, the manifest says 10"):
        check_file(path, entry)
    path.write_bytes(b"0123456780")
    with pytest.raises(WeightsError, match=r"has sha256 \w+, the manifest says"):
        check_file(path, entry)
    with pytest.raises(WeightsError, match="cannot read"):
        check_file(tmp_path / "nothing", entry)


class Hostile:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


def headed(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def tensor(**changes) -> bytes:
    told = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return headed(json.dumps({"x": told}).encode(), body=bytes(16))


HOSTILE = {
    "pickle": pickle.dumps(Hostile()),
    "empty": b"",
    "one byte": b"\x08",
    "html": b"<!DOCTYPE html><html>Not found</html>" * 9,
    "a header longer than the file": headed(b"{}", 2**63),
    "a header as long as memory": headed(b"{}", LARGEST_HEADER),
    "no JSON": headed(b"{" * 50),
    "deep JSON": headed(b'{"x":' + b"[" * 60_000 + b"]" * 60_000 + b"}"),
    "a shape that overflows": tensor(shape=[2**62, 2**62]),
    "a shape beyond the file": tensor(shape=[2**31, 2**31]),
    "offsets beyond the file": tensor(shape=[2**20], data_offsets=[0, 2**22]),
    "offsets backwards": tensor(data_offsets=[16, 0]),
    "negative offsets": tensor(data_offsets=[-16, 0]),
    "a negative shape": tensor(shape=[-2, -2]),
    "bytes behind the tensors": tensor() + b"more",
    "an unknown type": tensor(dtype="PICKLE"),
    "integers": tensor(dtype="I32"),
    "truths": tensor(dtype="BOOL", shape=[16]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(WeightsError) as caught:
        check_tensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_archives_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save({"x": torch.zeros(2)}, path)  # a zip with a pickle in it
    assert zipfile.is_zipfile(path)
    with pytest.raises(WeightsError, match="is no safetensors file"):
        check_tensors(path)


@given(damage=st.data())
def test_a_damaged_header_never_ends_in_a_traceback(damage, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, path)
    content = bytearray(path.read_bytes())
    place = damage.draw(st.integers(0, len(content) - 1))
    content[place] = damage.draw(st.integers(0, 255))
    path.write_bytes(content[: damage.draw(st.integers(1, len(content)))])
    try:
        shapes = check_tensors(path)
    except WeightsError as error:
        assert "\n" not in str(error)
    else:
        assert len(shapes) == 2


def test_the_ends_of_a_model_have_one_name():
    """Written twice: a model imports nothing of the weights until it is asked for some."""
    assert (f"{FIRST_CONV}.weight", f"{CLASSIFIER}.weight") == (FIRST, HEAD)


def test_a_whole_file_has_its_shapes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3).half(), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    assert check_tensors(path) == {"a": (3,), "b": (2, 2)}
