"""Files that are whole, or as they were."""

import os
import subprocess
import sys

import pytest

from metala_vision.errors import UserError
from metala_vision.files import replacing, write_text


def test_a_file_is_as_it_was_until_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first\r\n")
    with pytest.raises(RuntimeError), replacing(path) as fresh:
        fresh.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == b"first\r\n" and os.listdir(tmp_path) == ["a.txt"]
    write_text(path, "second")
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["a.txt"]


def test_a_link_stays_one_and_a_neighbour_is_left_alone(tmp_path):
    (tmp_path / "a.new.txt").write_text("mine")
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "b.txt").read_text() == "text" and (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "a.new.txt").read_text() == "mine"


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "a.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            write_text(path, "text")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.launch
def test_a_stream_is_written_to_itself():
    code = "from pathlib import Path; from metala_vision.files import write_text as w; "
    code += "w(Path('/dev/stdout'), 'told')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "told", done.stderr
