"""A training step by part: what belongs where, and that the parts are the whole."""

import argparse
import json
from collections import Counter, defaultdict

import pytest
import timm
import torch
from torch.profiler import record_function

from metala_vision.errors import UserError
from tests.benchmarks._load import load

step = load("step")
DEPTH = 2


def traced():
    """Events of a step of a small backbone whose parts are labelled."""
    model = timm.create_model("metala_nano", embed_dim=32, depth=DEPTH, num_heads=1)
    x, labels = torch.randn(2, 3, 32, 32), step.Labels()
    with labels.model(model):
        call = step.labelled_step(model, x, labels)
        call()
        return step.trace(lambda: call(lambda phase: record_function(step.PHASE + phase)))


@pytest.fixture(scope="module")
def events():
    return traced()


def counts(events):
    """{(phase, part): how often each operation}."""
    found = defaultdict(Counter)
    for phase, part, name, _ in step.placed(events, step.operations(events)):
        found[phase, part][name] += 1
    return found


def where(events, name):
    """{(phase, part): how often} of one operation."""
    return {place: names[name] for place, names in counts(events).items() if names[name]}


def test_operations_are_in_the_part_that_they_were_made_for(events):
    forward, backward = "forward", "backward"
    assert where(events, "aten::convolution") == {
        (forward, "patch embedding"): 1, (forward, "convolution"): DEPTH,
    }  # fmt: skip
    assert where(events, "aten::convolution_backward") == {
        (backward, "patch embedding"): 1, (backward, "convolution"): DEPTH,
    }  # fmt: skip
    norms = where(events, "aten::native_layer_norm_backward")
    assert norms[backward, "norms"] == 2 * DEPTH + 1
    assert set(norms) <= {(backward, "norms"), (backward, "norm and gate")}
    assert where(events, "aten::_log_softmax_backward_data") == {(backward, "head and loss"): 1}
    # Of each linear layer a product forward, two backward: the input's gradient and the weight's.
    products = where(events, "aten::mm")
    assert products[backward, "projections"] == 2 * products[forward, "projections"] == 4 * DEPTH
    assert products[backward, "GLU"] == 2 * products[forward, "GLU"] == 4 * DEPTH
    adam = where(events, "aten::_fused_adamw_")
    assert set(adam) == {("optimizer", "optimizer")}
    found = counts(events)
    for part in ("operator", "norm and gate"):
        assert sum(found[forward, part].values()) > 5 and sum(found[backward, part].values()) > 5
    for phase in (forward, backward):  # residuals and pooling
        assert not {"aten::mm", "aten::bmm", "aten::convolution"} & set(found[phase, step.ELSE])


def test_without_labels_in_the_backward_pass_they_would_be_missed(monkeypatch):
    monkeypatch.setattr(step.Labels, "_open_in_backward", lambda *_: None)
    assert set(where(traced(), "aten::convolution_backward")) == {("backward", step.ELSE)}


def covered(events, start, end):
    """Milliseconds in which any operation runs, by merging their intervals."""
    total, last = 0.0, start
    for ts, until in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        if start <= ts < end:
            total += max(0.0, until - max(ts, last))
            last = max(last, until)
    return 1e-3 * total


def test_the_parts_add_up_to_the_time_in_which_operations_run(events, monkeypatch):
    """Times are rounded to a nanosecond: each operation's own time by one for itself and each
    that it calls, so the sum by two for each."""
    monkeypatch.setattr(step, "ENGINE", "no operation is called so")
    work = step.operations(events)
    found = step.attribute(events, work, by_kind=False)
    ops = [e for e in events if e.get("cat") == "cpu_op" and e["ph"] == "X"]
    for phase in step._ranges(events, step.PHASE):
        parts = found[phase["name"].removeprefix(step.PHASE)]
        end = phase["ts"] + phase["dur"]
        whole = covered(ops, phase["ts"], end)
        assert sum(parts.values()) == pytest.approx(whole, abs=2e-6 * len(ops))
        assert sum(parts.values()) <= 1e-3 * phase["dur"] + 2e-6 * len(ops)


class Doubled(torch.autograd.Function):
    """Such a node, of Python, is what the kernels make."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, d_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * d_y


def test_a_node_of_python_opens_its_part_too():
    x, labels = torch.randn(3, requires_grad=True), step.Labels()

    def call():
        with record_function("phase: forward"):
            y = labels.call("operator", Doubled.apply, x.neg()).exp()
        with record_function("phase: backward"):
            y.sum().backward()

    found = step.trace(call)
    assert where(found, "aten::mul") == {
        ("forward", "operator"): 1, ("backward", "operator"): 1, ("backward", step.ELSE): 1,
    }  # fmt: skip
    assert where(found, "aten::neg") == {("forward", step.ELSE): 1, ("backward", step.ELSE): 1}


def annotation(name, ts, dur, tid=1):
    return {"cat": "user_annotation", "ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid}


def launched(name, ts, tid, number, dur, cat="kernel"):
    """A kernel long after its launch."""
    runtime = {"cat": "cuda_driver" if number % 2 else "cuda_runtime", "ph": "X", "name": "launch",
               "ts": ts, "dur": 1, "tid": tid, "args": {"correlation": number}}  # fmt: skip
    kernel = {"cat": cat, "ph": "X", "name": name, "ts": ts + 5000, "dur": dur, "tid": 99,
              "args": {"correlation": number}}  # fmt: skip
    return [runtime, kernel]


def test_a_kernel_belongs_to_the_range_of_its_launch_in_the_thread_of_its_launch():
    main, autograd = 1, 2
    events = [
        annotation("phase: forward", 0, 100), annotation("part: norms", 10, 50),
        annotation("part: operator", 20, 10), *launched("a", 15, main, 1, 3),
        *launched("b", 25, main, 2, 5), *launched("c", 35, main, 3, 7),
        *launched("d", 70, main, 4, 11), annotation("phase: backward", 100, 100),
        annotation("part: GLU", 120, 20, autograd), *launched("e", 125, autograd, 5, 13),
        *launched("f", 126, main, 6, 17), *launched("set", 150, autograd, 7, 19, "gpu_memset"),
        *launched("h", 139, 77, 10, 29),
        annotation("phase: optimizer", 200, 50), *launched("g", 210, main, 8, 23),
        *launched("outside", 300, main, 9, 1000),
    ]  # fmt: skip
    work = step.kernels(events)
    assert len(work) == 10
    found = step.attribute(events, work, by_kind=False)
    expected = {
        "forward": {"norms": 0.010, "operator": 0.005, step.ELSE: 0.011},
        "backward": {"GLU": 0.042, step.ELSE: 0.036},
        "optimizer": {"optimizer": 0.023},
    }
    assert set(found) == set(expected)
    for phase, parts in expected.items():
        assert found[phase] == pytest.approx(parts)
    inside = sum(ms for name, ms, _, _ in work if name != "outside")
    assert sum(sum(parts.values()) for parts in found.values()) == pytest.approx(inside)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_red_fused_convolution_mm_tanh_3", "fused, with sums"),
        ("triton_poi_fused_add_0", "fused, elementwise"),
        ("triton_poi_fused_gated_norm_silu_2", "fused, elementwise"),
        ("gated_linear_attention_bwd_kernel", "operator"),
        ("gated_norm_fwd_kernel", "norm and gate, one kernel"),
        ("depthwise_conv_bwd_kernel", "convolution and SiLU, one kernel"),
        ("nvjet_hsh_128x128_64x4_1x2_h_bz_NNN", "products"),
        ("sm90_xmma_gemm_bf16bf16", "products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::conv_depthwise2d_backward_kernel", "convolutions"),
        ("pytorch_flash::flash_fwd_kernel", "softmax attention"),
        ("Memset (Device)", "copies and fills"),
        ("what_is_this", "other kernels"),
    ],
)
def test_kernels_have_a_kind_by_their_name(name, kind):
    assert step.kind(name) == kind


def test_a_run_is_a_file_with_a_row_for_each_phase_and_a_picture(tmp_path, capsys):
    out = tmp_path / "step.json"
    given = argparse.Namespace(out=out, model="metala_nano", size=32, batch=1, no_compile=True,
                               retry=False)  # fmt: skip
    step.run(given)
    result = json.loads(out.read_text())
    assert [r["phase"] for r in result["rows"]] == [f"eager {p}" for p in step.PHASES]
    for row in result["rows"]:
        assert sum(row["parts"].values()) + row["idle"] == pytest.approx(row["ms"])
    assert "operator" in capsys.readouterr().out
    load("pictures").step(result, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
    given.batch = 2
    with pytest.raises(UserError, match=r"step\.json is of other settings"):
        step.run(given)
