"""Runs in processes of their own, that a test may kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
OF_THE_MACHINE = ("seconds", "img_per_s", "waited", "memory_mib")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(
    flags, processes=1, nodes=(), script="train_imagenet.py", gpu=False, **kwargs
) -> subprocess.Popen:
    """train_imagenet.py, under torchrun for several processes; in a process group of its own.

    nodes: torchrun's flags of one of several agents. gpu: leave it the GPUs.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PYTHONPATH"] = str(ROOT)  # for a script that lies elsewhere
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable]
    if processes > 1 or nodes:
        where = nodes or ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", *where]
    return subprocess.Popen(
        [*command, str(script), *map(str, flags)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **kwargs,
    )  # fmt: skip


def finish(process: subprocess.Popen, status=0, timeout=300) -> tuple[str, str]:
    """What it printed; its exit status must be that."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, f"{process.returncode}\n{out[-2000:]}\n{err[-6000:]}"
    return out, err


def kill_at(process: subprocess.Popen, run_dir: Path, step: int, timeout=240) -> bool:
    """SIGKILL the whole group when the metrics tell of that step; whether it had to be."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        assert time.monotonic() < end, "the run does not reach the step"
        if step_reached(run_dir) >= step:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.01)
    process.communicate()
    return False


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int, timeout=240) -> None:
    """Until the metrics tell of it."""
    end = time.monotonic() + timeout
    while step_reached(run_dir) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "the run does not reach the step"
        time.sleep(0.02)


def step_reached(run_dir: Path) -> int:
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return max(json.loads(line).get("step", 0) for line in lines)
    except (OSError, ValueError):
        return -1


def children(pid: int):
    """Processes that this one has started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    yield int(entry.name)
            except (OSError, ValueError):
                continue


def metrics(run_dir: Path) -> list[dict]:
    """Without the times."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in OF_THE_MACHINE} for x in lines]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Bit by bit: metrics, and weights of the last and the best checkpoint."""
    assert metrics(run_dir) == metrics(expected)
    for name in ("last", "best"):
        ours, theirs = (load_file(r / name / "model.safetensors") for r in (run_dir, expected))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name
