"""The selective scan: the portable forms against the definition, and wrong calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metala_vision.kernels.selective_scan import eager, selective_scan, selective_scan_op
from metala_vision.kernels.selective_scan.chunked import chunked
from tests._numerics import LENGTHS, SAME, bound, relative_rms
from tests.kernels._cases import SCAN_MODES, STEP_GATES, scan_errors, scan_inputs
from tests.kernels._common import assert_second_derivatives_refused, one_node

RULE = bound(torch.float32, "y")


@pytest.mark.parametrize("gates", STEP_GATES)
@pytest.mark.parametrize("N", LENGTHS)
def test_the_portable_form_meets_the_rule(N, gates):
    measured = scan_errors(N, gates, impl="chunked")
    assert max(measured.values()) <= RULE, measured


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", SCAN_MODES)
def test_every_mode(mode, dtype):
    measured = scan_errors(75, impl="chunked", working_dtype=dtype, **SCAN_MODES[mode])
    # in float64 what stays float32's is read alike by both
    limit = 1e-12 if dtype == torch.float64 else bound(dtype, "y")
    assert max(measured.values()) <= limit, measured


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5),
    st.sampled_from(list(SCAN_MODES)), st.sampled_from(STEP_GATES),
)  # fmt: skip
def test_any_shape_meets_the_rule(N, B, E, M, mode, gates):
    measured = scan_errors(N, gates, impl="chunked", B=B, E=E, M=M, **SCAN_MODES[mode])
    assert max(measured.values()) <= RULE, measured


def test_the_backward_pass_in_many_parts_is_the_same(monkeypatch):
    found = []
    for states in (2**18, 1):
        monkeypatch.setattr(eager, "STATES_AT_ONCE", states)
        inputs = some(100, torch.float32)
        found.append(torch.autograd.grad(selective_scan(**inputs).sum(), list(inputs.values())))
    for whole, parts in zip(*found, strict=True):
        assert relative_rms(parts, whole) <= SAME


def test_steps_below_float32_leave_the_skip():
    given_ = {n: x.requires_grad_() for n, x in scan_inputs(40, "all-100").items()}
    y = selective_scan(**given_)
    assert relative_rms(y.detach(), 2 * (given_["skip"] * given_["u"]).detach()) <= SAME
    for x in torch.autograd.grad(y.square().sum(), list(given_.values())):
        assert torch.isfinite(x).all()


def test_steps_of_hundreds_forget_everything():
    """softplus(300) is 300: exp(-300 |A|) is 0, and a token sees its own part alone."""
    given_ = scan_inputs(20, dtype=torch.float64)
    given_ |= {"delta": torch.full((2, 20, 5), 300.0, dtype=torch.float64)}
    y = selective_scan(**given_, direction="forward")
    kq = (given_["k"] * given_["q"]).sum(2, keepdim=True)
    bias = given_["delta_bias"].double()
    assert relative_rms(y, ((300 + bias) * kq + given_["skip"]) * given_["u"]) <= 1e-12


def some(N=9, dtype=torch.float64, **options):
    return {n: x.to(dtype).requires_grad_() for n, x in scan_inputs(N, B=1, E=3, M=2, **options)
            .items()}  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_gradcheck_twice(direction):
    inputs = some(5)
    inputs["A"] = (inputs["A"].detach() / 16).requires_grad_()

    def call(*tensors):
        return selective_scan(*tensors, direction=direction)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(call, tuple(inputs.values()))


def test_nothing_of_the_callers_is_written_over_and_inference_gives_the_same_bits():
    for N in (8, 64, 9):
        inputs = some(N, torch.float32)
        before = {name: x.detach().clone() for name, x in inputs.items()}
        expected = selective_scan(**inputs)
        with torch.no_grad():
            assert torch.equal(selective_scan(**inputs), expected)
        torch.autograd.grad(expected.sum(), list(inputs.values()))
        assert all(torch.equal(inputs[name], x) for name, x in before.items())


def test_one_direction_does_not_hear_of_the_future():
    inputs = scan_inputs(40)
    y = selective_scan(**inputs, direction="forward")
    changed = {**inputs, "u": torch.cat([inputs["u"][:, :20], inputs["u"][:, 20:] + 1], 1)}
    other = selective_scan(**changed, direction="forward")
    assert torch.equal(other[:, :20], y[:, :20]) and not torch.equal(other[:, 20:], y[:, 20:])


def test_a_sample_alone_is_the_sample_in_a_batch():
    inputs = scan_inputs(50, B=3, E=40, M=16)
    whole = selective_scan(**inputs)
    alone = {n: x[1:2] if n in ("u", "delta", "k", "q") else x for n, x in inputs.items()}
    assert torch.equal(selective_scan(**alone), whole[1:2])


def test_only_inputs_are_saved():
    inputs, saved = some(64, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        selective_scan(**inputs)
    assert {x.data_ptr() for x in saved} <= {x.data_ptr() for x in inputs.values()}


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_a_transform_and_a_compiled_graph_give_the_same():
    inputs = tuple(some(70, torch.float32, own=("u", "A")).values())
    expected = selective_scan(*inputs)
    plain = [x.detach() for x in inputs]
    scripted = torch.jit.script(selective_scan_op)
    assert relative_rms(scripted(*plain, "bidirectional", None), expected.detach()) <= SAME
    one = list(some(70, torch.float32).values())

    def of_one_channel_more(u, delta):
        return selective_scan_op(u[None], delta[None], *one[2:3], *one[3:], "forward", None)[0]

    mapped = torch.vmap(of_one_channel_more)(one[0], one[1])
    assert relative_rms(mapped, selective_scan(*one, direction="forward")) <= SAME

    def loss(*tensors):
        return selective_scan_op(*tensors, "bidirectional", None).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eagerly in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs),
        strict=True,
    ):  # fmt: skip
        assert relative_rms(ours, eagerly) <= SAME


@one_node
def test_a_second_derivative_of_the_node_is_refused_and_not_zero():
    inputs = some(9, torch.float32)
    assert_second_derivatives_refused(
        "selective_scan", lambda: selective_scan(**inputs), inputs["u"]
    )


def test_autocast_changes_nothing():
    inputs = some(70, torch.float32)
    expected = selective_scan(**inputs)
    gradients = torch.autograd.grad(expected.sum(), list(inputs.values()))
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(**inputs)
        again = torch.autograd.grad(y.sum(), list(inputs.values()))
        graph = chunked(*(x[None] for x in inputs.values()), "forward", None)
    forward = selective_scan(**inputs, direction="forward")
    assert torch.equal(y, expected) and graph.dtype == torch.float32
    assert relative_rms(graph[0].detach(), forward.detach()) <= SAME
    assert all(torch.equal(x, z) for x, z in zip(gradients, again, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "up"}, "direction='up' is unknown; accepted: forward"),
        ({"u": torch.zeros(9, 3)}, r"u must be \[B, N, E\].*got shape \[9, 3\]"),
        ({"u": torch.zeros(1, 0, 3)}, "no dimension 0"),
        ({"A": torch.zeros(3, 65)}, r"M from 1 to 64, got \[3, 65\]"),
        ({"A": torch.ones(3, 2)}, r"A must be <= 0, got 1\.0"),
        ({"A": torch.nn.Parameter(torch.ones(3, 2))}, r"A must be <= 0, got 1\.0"),
        ({"A": torch.zeros(4, 2)}, r"A must have shape \[3, 2\] or \[2, 3, 2\], got \[4, 2\]"),
        ({"k": torch.zeros(1, 9, 3)}, r"k must have shape \[1, 9, 2\] or \[2, 1, 9, 2\]"),
        ({"skip": torch.zeros(2)}, r"skip must have shape \[3\] or \[2, 3\], got \[2\]"),
        (
            {"u": torch.zeros(2, 1, 9, 3), "direction": "forward"},
            "u with one for each direction needs direction='bidirectional', got 'forward'",
        ),
        ({"q": torch.zeros(1, 9, 2).int()}, r"q has dtype torch\.int32; accepted"),
        ({"q": torch.zeros(1, 2, 9).transpose(1, 2)}, "q needs a contiguous last dimension"),
        ({"delta_bias": torch.zeros(3, device="meta")}, "delta_bias is on meta, u on cpu"),
        ({"order": torch.arange(8)}, r"order must be \[9\] int32 or int64"),
        ({"order": torch.zeros(9, dtype=torch.long)}, r"once, starts with \[0, 0"),
        ({"impl": "portable"}, "impl='portable' is not available here"),
    ],
)
def test_a_wrong_call_names_the_value(changes, message):
    inputs = {name: x.detach() for name, x in some(dtype=torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, **changes})


def test_the_rule_notices_a_wrong_decay():
    inputs = scan_inputs(50)
    exact = selective_scan(**{n: x.double() for n, x in inputs.items()}, impl="reference")
    off = selective_scan(**{**inputs, "A": inputs["A"] * (1 + 1e-3)})
    assert relative_rms(off, exact) > 3 * RULE


@pytest.mark.parametrize("graph", [False, True])
def test_states_of_single_tokens_are_never_all_there(graph):
    """The largest tensor of a forward pass, in numbers a token: eager a 16th of the states, in a
    graph a quarter; or one of the inputs."""
    N, E, M = 512, 64, 16
    inputs = scan_inputs(N, B=1, E=E, M=M)
    profile = torch.profiler.profile(profile_memory=True, acc_events=True)
    with torch.no_grad(), profile as seen:
        if graph:
            chunked(*(x[None] for x in inputs.values()), "forward", None, eager.CHUNK_OF_A_GRAPH)
        else:
            selective_scan(**inputs, direction="forward")
    largest = max(event.cpu_memory_usage for event in seen.events() if event.name[:5] == "aten:")
    assert largest <= 4 * N * max(E * M / (eager.CHUNK_OF_A_GRAPH if graph else 16), 2 * E)
