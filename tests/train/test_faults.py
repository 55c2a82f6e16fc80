"""A run in the real world: torn files, full disks, dead workers, numbers that break."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from metala_vision.checkpoint import FILES, Checkpoints, _describe, load_state, verify
from metala_vision.cli import main
from metala_vision.config_file import load_config
from metala_vision.errors import ReportedError, UserError, worker_died
from metala_vision.processes import agree
from tests.conftest import SMALL_MODEL
from tests.train._runs import ROOT, assert_same_run, children, finish, launch, wait_for_step


def flags(tree, run_dir, *more):
    return [
        "train", *SMALL_MODEL, "--batch-size", "12", "--workers", "0", "--epochs", "3",
        "--warmup-epochs", "1", "--log-interval", "1", "--checkpoint-minutes", "0.0001",
        "--data-dir", str(tree), "--run-dir", str(run_dir), "--resume", "auto", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(digit_tree, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert main(flags(digit_tree, run_dir)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_dir


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the run, that ended at step 9 and has checkpoints of steps 8 and 9."""
    run_dir = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    assert (run_dir / "checkpoints" / "step-00000008").is_dir()
    return run_dir


class Hostile:
    """Code that a foreign pickle runs where it is loaded without care."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(bytes(content))


def swap(path):
    path.write_bytes(pickle.dumps(Hostile(path.parent / "trace")))


DAMAGE = [
    *((name, how) for name in (*FILES, "manifest.json") for how in (tear, Path.unlink)),
    *((name, flip) for name in FILES), *((name, swap) for name in (*FILES, "manifest.json")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "how"), DAMAGE, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_a_damaged_checkpoint_is_refused(name, how, stopped):
    newest = stopped / "checkpoints" / "step-00000009"
    how(newest / name)
    with pytest.raises(UserError, match=r"is damaged|is no whole checkpoint") as caught:
        verify(newest)
    assert "\n" not in caught.value.line and str(newest) in caught.value.line
    told = []
    assert Checkpoints(stopped).newest(told.append) == 8
    assert len(told) == 1 and told[0].endswith("the checkpoint before it is used")
    assert not (newest / "trace").exists()


def test_the_run_goes_on_from_the_one_before(stopped, finished, digit_tree, capsys):
    flip(stopped / "checkpoints" / "step-00000009" / "model.safetensors")
    assert main(flags(digit_tree, stopped)) == 0
    out = capsys.readouterr().out
    assert "model.safetensors is damaged: sha256" in out and "resumed at step 8 of 9" in out
    assert_same_run(stopped, finished)
    verify(stopped / "checkpoints" / "step-00000009")  # written again


def test_a_pickle_with_a_manifest_of_its_own_runs_no_code(stopped, digit_tree, capsys):
    for step in (8, 9):
        folder = stopped / "checkpoints" / f"step-0000000{step}"
        swap(folder / "training_state.pt")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["training_state.pt"] = _describe(folder / "training_state.pt")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        verify(folder)
        with pytest.raises(UserError, match=r"cannot read .*training_state\.pt") as caught:
            load_state(folder)
        assert "\n" not in caught.value.line and not (folder / "trace").exists()
    for path in sorted((stopped / "checkpoints").iterdir())[:-2]:
        shutil.rmtree(path)
    before = (stopped / "metrics.jsonl").read_bytes()
    assert main(flags(digit_tree, stopped)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(f"none of the 2 checkpoints in {stopped / 'checkpoints'} can be used")
    assert (stopped / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [{}, {"format": 2}, [1], {"format": 1}], ids=str)
def test_a_foreign_training_state_is_refused(content, stopped, digit_tree, capsys):
    folder = stopped / "checkpoints" / "step-00000009"
    torch.save(content, folder / "training_state.pt")
    if content != {"format": 1}:
        with pytest.raises(UserError, match="is no training state of this program"):
            load_state(folder)
        return
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["training_state.pt"] = _describe(folder / "training_state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(flags(digit_tree, stopped)) == 2
    assert "the checkpoint of step 9 lacks 'data'" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(finished, stopped, digit_tree, tmp_path, capsys):
    other = tmp_path / "other"
    assert main(flags(digit_tree, other, "--model-kwargs", "embed_dim=64", "num_heads=1")) == 0
    for name in ("config.yaml",):
        shutil.copy(finished / name, other / name)
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert main(flags(digit_tree, other)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "the checkpoint does not fit this run: " in error[0]


def test_other_images_are_refused(stopped, own_digit_tree, capsys):
    image = own_digit_tree / "train" / "digit0" / "00.png"
    image.rename(image.with_name("zz.png"))
    assert main(flags(own_digit_tree, stopped)) == 2
    assert "the images are not those that" in capsys.readouterr().err


@pytest.mark.launch
def test_another_number_of_processes_is_refused(stopped, digit_tree):
    err = launch_once(flags(digit_tree, stopped), processes=2)
    assert err.count("is on 1 process(es), this is 2: an exact resume needs as many") == 1


def launch_once(given, processes, **kwargs):
    process = launch(given[1:], processes, **kwargs)
    _, err = process.communicate(timeout=200)
    assert process.returncode
    return err


@pytest.mark.launch
def test_a_folder_in_which_a_run_trains_is_refused(digit_tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("metala_vision.run_folder.LOCK_WAIT", 1)
    run_dir = tmp_path / "run"
    more = ("--epochs", "5000", "--eval-interval", "5000")
    running = launch(flags(digit_tree, run_dir, *more)[1:])
    wait_for_step(running, run_dir, 1)
    assert main(flags(digit_tree, run_dir, *more)) == 2
    assert f"another process is training in {run_dir}" in capsys.readouterr().err
    running.kill()
    running.communicate()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted")
    except FileNotFoundError:
        pytest.skip("no mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("room", [60_000, 250_000], ids=["weights", "state"])
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    room, small_disk, digit_tree, tmp_path, capsys
):
    """Room for neither of weights (140 kB) and state, or for the weights alone."""
    run_dir = small_disk / "run"
    assert main(flags(digit_tree, run_dir, "--epochs", "1")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    (run_dir / "config.yaml").write_text(
        (run_dir / "config.yaml").read_text().replace("epochs: 1\n", "epochs: 2\n", 1)
    )
    kept = (run_dir / "last").resolve().name
    left = os.statvfs(small_disk)
    patch = run_dir / "changes.patch"  # written at the next start too
    room += patch.stat().st_size if patch.exists() else 0
    (small_disk / "ballast").write_bytes(bytes(left.f_bavail * left.f_frsize - room))
    capsys.readouterr()
    assert main(flags(digit_tree, run_dir, "--epochs", "2")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write checkpoint" in error and "No space left on device" in error
    assert error.endswith(f"is kept in {run_dir / 'last'}")
    assert (run_dir / "last").resolve().name == kept
    verify(run_dir / "last")
    assert not list((run_dir / "checkpoints").glob("*.new"))
    (small_disk / "ballast").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(flags(digit_tree, run_dir, "--epochs", "2")) == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
@pytest.mark.launch
def test_a_dead_worker_is_reported_with_its_cause(digit_tree, tmp_path):
    run_dir = tmp_path / "run"
    more = ("--epochs", "5000", "--eval-interval", "5000", "--workers", "2")
    running = launch(flags(digit_tree, run_dir, *more)[1:])
    wait_for_step(running, run_dir, 4)
    for worker in children(running.pid):
        os.kill(worker, signal.SIGKILL)
    _, err = finish(running, status=2)
    error = err.strip().splitlines()[-1]
    # Its signal, unless torch has found it gone before it was told.
    assert "is killed by signal: Killed" in error or "exited unexpectedly" in error
    assert "DataLoader worker (pid" in error and "Out of memory is a common cause" in error
    assert error.endswith(f"is kept in {run_dir / 'last'}")


class Waiting(torch.utils.data.Dataset):
    """Its worker sleeps behind the first batches."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        time.sleep(0 if index < 2 else 60)
        return torch.zeros(1)


def test_a_worker_that_dies_while_it_hands_a_batch_over():
    """Then the socket's error comes first."""
    draws = iter(torch.utils.data.DataLoader(Waiting(), num_workers=1))
    next(draws)
    # torch's handler would tell it at any line.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.kill(draws._workers[0].pid, signal.SIGKILL)

    def reset(timeout):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    draws._data_queue = SimpleNamespace(get=reset)
    with pytest.raises(ConnectionResetError) as caught:
        next(draws)
    line = str(worker_died(caught.value))
    assert line.startswith(f"DataLoader worker (pid {draws._workers[0].pid}) is killed by signal: ")
    draws._shutdown_workers()
    signal.signal(signal.SIGCHLD, handler)
    for other in (ConnectionResetError(), RuntimeError("else"), FileNotFoundError()):
        assert worker_died(other) is None


@pytest.mark.launch
def test_lonely_processes_are_refused(digit_tree, tmp_path):
    """WORLD_SIZE without the rest: each would be a rank 0."""
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    command = [sys.executable, "train_imagenet.py", *flags(digit_tree, tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    errors = done.stderr.strip().splitlines()
    assert errors[-1].startswith("train_imagenet.py: error: ") and "2" in errors[-1]
    assert "Traceback" not in done.stderr


def test_processes_agree_on_an_error(monkeypatch):
    class Of:
        num_processes, is_main_process = 3, True

    monkeypatch.setattr("metala_vision.processes.gather_object", lambda x: [None, "no data", None])
    with pytest.raises(UserError, match="process 1: no data"):
        agree(Of(), None)  # pyright: ignore[reportArgumentType]
    Of.is_main_process = False
    with pytest.raises(ReportedError):
        agree(Of(), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.launch
def test_one_process_of_two_without_the_images(digit_tree, tmp_path):
    """Both end, and one line tells it."""
    script = tmp_path / "blind.py"
    script.write_text(
        "import os, sys\nfrom metala_vision.cli import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--data-dir') + 1] = '/nowhere'\n"
        "sys.exit(main(sys.argv[1:], command='train'))\n"
    )
    err = launch_once(flags(digit_tree, tmp_path / "run"), processes=2, script=script)
    lines = [line for line in err.splitlines() if line.startswith("metala-vision: ")]
    assert lines == ["metala-vision: error: process 1: data folder /nowhere does not exist"]
    assert not (tmp_path / "run").exists()


def test_metrics_that_were_cut_short_are_refused(stopped, digit_tree, capsys):
    tear(stopped / "metrics.jsonl")
    assert main(flags(digit_tree, stopped)) == 2
    assert "is shorter than it was at the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "left", [(), ("environment.json",), ("environment.json", "config.yaml.new")]
)
def test_killed_while_its_folder_was_made_a_run_begins(left, digit_tree, tmp_path, finished):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in left:
        (run_dir / name).write_text("{")
    assert main(flags(digit_tree, run_dir)) == 0
    assert_same_run(run_dir, finished)


def test_a_run_keeps_the_checkpoint_it_has_just_written(stopped):
    """Damaged ones of later steps do not count among the newest."""
    checkpoints = Checkpoints(stopped)
    folder = checkpoints.folder
    for step in (20, 30):
        shutil.copytree(folder / "step-00000009", checkpoints.path(step))
        tear(checkpoints.path(step) / "model.safetensors")
    assert checkpoints.newest(lambda line: None) == 9
    checkpoints.set_aside_behind(9)
    checkpoints.prune({})
    assert checkpoints.steps() == [8, 9]
    assert {p.name for p in folder.glob("*.damaged")} == {
        "step-00000020.damaged", "step-00000030.damaged",
    }  # fmt: skip
    shutil.copytree(folder / "step-00000009", folder / "step-00000012.new")
    checkpoints.sweep()
    assert not list(folder.glob("*.new"))


def test_a_checkpoint_under_another_name_is_refused(stopped):
    folder = stopped / "checkpoints"
    shutil.copytree(folder / "step-00000009", folder / "step-00000010")
    with pytest.raises(UserError, match="step-00000010 holds the checkpoint of step 9"):
        verify(folder / "step-00000010")


def test_without_links_a_copy_is_made_and_never_through_a_link(stopped, monkeypatch):
    checkpoints = Checkpoints(stopped)
    kinds = {"EOPNOTSUPP": errno.EOPNOTSUPP, "ENOSPC": errno.ENOSPC}
    before = (checkpoints.path(8) / "training_state.pt").read_bytes()
    checkpoints.point("best", 8)

    def refuse(self, *_, **__):
        raise OSError(kinds[kind], os.strerror(kinds[kind]))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    kind = "ENOSPC"
    with pytest.raises(UserError, match=r"cannot write .*best: .*No space left"):
        checkpoints.point("best", 9)
    assert (stopped / "best").resolve() == checkpoints.path(8).resolve()
    kind = "EOPNOTSUPP"
    for _ in range(2):
        checkpoints.point("best", 9)
    assert (stopped / "best").is_dir() and not (stopped / "best").is_symlink()
    assert (checkpoints.path(8) / "training_state.pt").read_bytes() == before
    for name in FILES:
        written = (checkpoints.path(9) / name).read_bytes()
        assert (stopped / "best" / name).read_bytes() == written


def test_the_stored_configuration_begins_another_run(finished):
    config = load_config(str(finished / "config.yaml"))
    assert config.run.run_dir is None and config.run.resume is None
