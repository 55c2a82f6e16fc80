"""CIFAR's pickles: arrays are read, code is not run, and damage is one line."""

import pickle

import numpy as np
import pytest

from metala_vision.config import DataConfig
from metala_vision.errors import UserError
from metala_vision.pickled_arrays import read_pickle
from metala_vision.splits import find_split
from tests.train._published import make_cifar


def split_of(name, root):
    return find_split(DataConfig(dataset=name, data_dir=root))


class Runs:
    """What a hostile pickle holds: it makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_pickle_that_would_run_code_is_refused(file, tmp_path):
    folder, marker = make_cifar(tmp_path), tmp_path / "marker"
    hostile = pickle.dumps({"data": Runs(marker), "labels": [], "label_names": []})
    pickle.loads(hostile)["data"].close()
    assert marker.exists()  # it works
    marker.unlink()
    (folder / file).write_bytes(hostile)
    with pytest.raises(UserError, match=rf"{file} as a pickle of arrays alone: it asks for .*open"):
        split_of("cifar10", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", r"it asks for os\.system"),
        (b"cnumpy\nload\n(S'x'\ntR.", r"it asks for numpy\.load"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"it asks for builtins\.eval"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "it asks for the codec rot13"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "it holds an array of O"),
        (b"cnumpy\ndtype\n(S'u1,O'\ntR.", "it holds an array of u1,O"),
        (b"cx\ny\nz\n", r"it asks for x\.y"),
        (b"]q\x00.", "holds a list, no dictionary"),
        (b"", "Ran out of input"),
        (b"version https://git-lfs", "cannot read"),
    ],
)
def test_other_pickles_are_one_line(code, line, tmp_path):
    (make_cifar(tmp_path) / "batches.meta").write_bytes(code)
    with pytest.raises(UserError, match=line) as caught:
        split_of("cifar10", tmp_path)
    assert "batches.meta" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("hundred", [False, True])
def test_damaged_cifar_is_read_or_told(hundred, tmp_path):
    name = "cifar100" if hundred else "cifar10"
    path = make_cifar(tmp_path, hundred) / ("train" if hundred else "data_batch_3")
    whole, told = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for i in range(60):
        data = bytearray(whole)
        data[int(rng.integers(300 if i % 2 else len(data)))] = int(rng.integers(256))
        path.write_bytes(data[: int(rng.integers(len(data)))] if i % 3 == 0 else data)
        try:
            split_of(name, tmp_path)
        except UserError as error:
            told += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert told > 20


class Call:
    """What a pickle writes of a call, and of a state set behind it."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "made",
    [
        Call(np.ndarray, Call(np.ndarray, (1,), "O", b"A" * 8)),  # pointers of the file's
        Call(np.ndarray, (2,), "u1"),
        Call(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b",
             state=(1, (1,), np.dtype("O"), False, [1])),
        Call(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b",
             state=(1, (10**12,), np.dtype("u1"), False, b"abc")),
        Call(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b",
             state=(1, (-3,), np.dtype("u1"), False, b"abc")),
    ],
    ids=["pointers", "an array that is called", "objects", "too large", "below zero"],
)  # fmt: skip
def test_a_pickle_that_would_make_memory_its_own_is_refused(made, tmp_path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": made}, protocol=2))
    with pytest.raises(UserError, match="cannot read"):
        read_pickle(path)


def test_flags_of_a_type_are_not_believed(tmp_path):
    path = tmp_path / "batch"
    kind = Call(np.dtype, "u1", False, True, state=(3, "|", None, None, None, -1, -1, 63))
    data = Call(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b",
                state=(1, (3,), kind, False, b"abc"))  # fmt: skip
    path.write_bytes(pickle.dumps({"data": data}, protocol=2))
    found = read_pickle(path)["data"]
    assert found.tolist() == [97, 98, 99] and not found.dtype.hasobject
