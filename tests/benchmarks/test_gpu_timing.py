"""The ways of a GPU, with a clock and counters in place of its events and memory."""

import pytest
import torch

from metala_vision.errors import UserError
from tests.benchmarks._load import load

gpu_timing, step = load("gpu_timing"), load("step")


class Event:
    """Of torch.cuda: marks a moment of `now`."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def cuda(monkeypatch):
    """GPU is true; a call of work(ms) takes so long and holds 3 MiB above 2 MiB."""
    Event.now = 0.0
    for module in (gpu_timing, step):
        monkeypatch.setattr(module, "GPU", True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)

    def work(ms):
        Event.now += ms

    return work


def test_a_step_is_the_median_between_marks(cuda):
    times = iter([100.0] * 4 + [1.0, 9.0, 4.0, 4.0, 2.0] * 40)  # four to warm up and to guess
    assert gpu_timing.step_milliseconds(lambda: cuda(next(times)), seconds=1e-9) == 4


def test_memory_is_the_whole_or_what_a_call_adds(cuda):
    assert gpu_timing.peak_mebibytes(lambda: None) == 3
    assert gpu_timing.peak_mebibytes(lambda: None, before=2**20) == 4


def test_kernels_are_counted_without_copies_and_ranges(cuda, monkeypatch):
    cats = ["kernel", "kernel", "gpu_memcpy", "cuda_runtime", "user_annotation", None]
    events = [{"cat": cat, "dur": 250 + i} for i, cat in enumerate(cats)]
    monkeypatch.setattr(gpu_timing, "trace", lambda call: events)
    assert gpu_timing.kernels_of(lambda: None) == (2, 0.501)


def test_kernels_with_a_cold_cache_are_those_behind_the_filling(cuda, monkeypatch):
    monkeypatch.setattr(gpu_timing, "DEVICE", torch.device("meta"))
    sums = iter([7.0, 9.0, 8.0])

    def trace(call):
        call()
        ours = [{"cat": "kernel", "ts": 2.0, "dur": 1e3 * next(sums)}]
        return [*ours, {"cat": "kernel", "ts": 1.0, "dur": 5e4}, {"cat": "gpu_memset", "dur": 1}]

    monkeypatch.setattr(gpu_timing, "trace", trace)
    assert gpu_timing.cold_kernels_ms(lambda: None) == 8.0


def test_a_profiler_that_sees_no_kernel_claims_none(cuda, monkeypatch):
    monkeypatch.setattr(gpu_timing, "trace", lambda call: [{"cat": "cpu_op", "dur": 1}])
    assert gpu_timing.kernels_of(lambda: None) == (None, None)
    monkeypatch.setattr(gpu_timing, "DEVICE", torch.device("meta"))
    assert gpu_timing.cold_kernels_ms(lambda: None) is None
    monkeypatch.setattr(step, "trace", lambda call: [])
    monkeypatch.setattr(step, "phase_times", lambda *_: {})
    with pytest.raises(UserError, match="the profiler saw no kernel"):
        step.rows("metala_nano", 32, 1, False)


def test_phases_are_timed_between_their_own_marks(cuda):
    def call(phase):
        for name, ms in (("forward", 3.0), ("backward", 5.0), ("optimizer", 1.0)):
            with phase(name):
                cuda(ms)
            cuda(100.0)  # between phases

    expected = {"forward": 3.0, "backward": 5.0, "optimizer": 1.0}
    assert step.phase_times(call, 4) == expected


def test_without_a_gpu_nothing_is_claimed_of_one():
    assert gpu_timing.peak_mebibytes(lambda: None) is None
    assert gpu_timing.kernels_of(lambda: None) == (None, None)


def test_calls_in_turn_are_told_apart_and_the_first_two_rounds_not_counted(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        calls.append(name)
        now[0] += 100 if len(calls) <= 4 else seconds

    assert gpu_timing.in_turn([lambda: call("a", 1), lambda: call("b", 3)], 3) == [1e3, 3e3]
    assert "".join(calls) == "ababababab"
