"""The linear recurrence: the portable form against the definition, and wrong calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metala_vision.kernels.linear_recurrence import linear_recurrence, linear_recurrence_op
from tests._numerics import GATES, LENGTHS, bound, normal, relative_rms
from tests.kernels._cases import RECURRENCE_MODES, recurrence_errors
from tests.kernels._common import assert_second_derivatives_refused, one_node

RULE = bound(torch.float32, "h")


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("N", LENGTHS)
def test_the_portable_form_meets_the_rule(N, gates):
    measured = recurrence_errors(N, gates, impl="chunked")
    assert max(measured.values()) <= RULE, measured


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", RECURRENCE_MODES)
def test_every_mode(mode, dtype):
    measured = recurrence_errors(75, impl="chunked", working_dtype=dtype, **RECURRENCE_MODES[mode])
    limit = 1e-12 if dtype == torch.float64 else bound(dtype, "h")  # log_decay stays float32's
    assert max(measured.values()) <= limit, measured


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 3), st.integers(1, 3), st.integers(1, 7),
    st.sampled_from(list(RECURRENCE_MODES)), st.sampled_from(list(GATES)),
)  # fmt: skip
def test_any_shape_meets_the_rule(N, B, M, C, mode, gates):
    measured = recurrence_errors(N, gates, impl="chunked", B=B, M=M, C=C, **RECURRENCE_MODES[mode])
    assert max(measured.values()) <= RULE, measured


def some(N=9, C=3, dtype=torch.float32):
    b = normal(1, N, 2, C, seed=0).to(dtype)
    return b, -normal(1, N, C, seed=1).abs().to(dtype)


def test_gradcheck_twice():
    b, log_decay = (x.double().requires_grad_() for x in some())
    for direction in ("forward", "bidirectional"):

        def call(b, log_decay, direction=direction):
            return linear_recurrence(b, log_decay, direction=direction)

        assert torch.autograd.gradcheck(call, (b, log_decay))
        assert torch.autograd.gradgradcheck(call, (b, log_decay))


def test_nothing_of_the_callers_is_written_over_and_inference_gives_the_same_bits():
    for N in (8, 64, 9):
        b, log_decay = some(N)
        before = b.clone(), log_decay.clone()
        expected = linear_recurrence(b.requires_grad_(), log_decay)
        with torch.no_grad():
            assert torch.equal(linear_recurrence(b, log_decay), expected)
        assert torch.equal(b, before[0]) and torch.equal(log_decay, before[1])


def test_one_direction_does_not_hear_of_the_future():
    b, log_decay = some(40)
    h = linear_recurrence(b, log_decay, direction="forward")
    changed = torch.cat([b[:, :20], b[:, 20:] + 1], 1)
    other = linear_recurrence(changed, log_decay, direction="forward")
    assert torch.equal(other[:, :20], h[:, :20]) and not torch.equal(other[:, 20:], h[:, 20:])


def test_a_sample_alone_is_the_sample_in_a_batch():
    b, log_decay = normal(3, 50, 1, 4, seed=0).float(), -normal(3, 50, 4, seed=1).abs().float()
    whole = linear_recurrence(b, log_decay)
    assert torch.equal(linear_recurrence(b[1:2], log_decay[1:2]), whole[:, 1:2])


def test_only_states_and_decays_are_saved():
    b, log_decay = (x.requires_grad_() for x in some(64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_recurrence(b, log_decay)
    assert sum(x.numel() for x in saved) <= 2 * b.numel() + 2 * log_decay.numel()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_a_transform_and_a_compiled_graph_give_the_same():
    b, log_decay = some(70)
    expected = linear_recurrence(b, log_decay)
    scripted = torch.jit.script(linear_recurrence_op)
    assert relative_rms(scripted(b, log_decay, "bidirectional", None), expected) <= 1e-6
    mapped = torch.vmap(lambda b, d: linear_recurrence_op(b[None], d[None], "forward", None)[0])
    assert relative_rms(mapped(b, log_decay), expected[0]) <= 1e-6
    given = [x.requires_grad_() for x in (b, log_decay)]

    def loss(b, log_decay):
        return linear_recurrence_op(b, log_decay, "bidirectional", None).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        torch.autograd.grad(compiled(*given), given), torch.autograd.grad(loss(*given), given),
        strict=True,
    ):  # fmt: skip
        assert relative_rms(ours, eager) <= 1e-6


@one_node
def test_a_second_derivative_of_the_node_is_refused_and_not_zero():
    b, log_decay = (x.requires_grad_() for x in some(9))
    assert_second_derivatives_refused(
        "linear_recurrence", lambda: linear_recurrence_op(b, log_decay, "forward", None), b
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "up"}, "direction='up' is unknown; accepted: forward"),
        ({"b": torch.zeros(1, 9, 3)}, r"b must be \[B, N, M, C\].*got shape \[1, 9, 3\]"),
        ({"b": torch.zeros(3, 1, 9, 2, 3)}, r"got shape \[3, 1, 9, 2, 3\]"),
        ({"b": torch.zeros(1, 0, 2, 3)}, "no dimension 0"),
        (
            {"b": torch.zeros(2, 1, 9, 2, 3), "direction": "forward"},
            "needs direction='bidirectional', got 'forward'",
        ),
        ({"log_decay": torch.zeros(1, 9, 4)}, r"log_decay must have shape \[1, 9, 3\]"),
        ({"log_decay": torch.ones(1, 9, 3)}, r"log_decay must be <= 0, got 1\.0"),
        (
            {"log_decay": torch.nn.Parameter(torch.ones(1, 9, 3))},
            r"log_decay must be <= 0, got 1\.0",
        ),
        ({"b": torch.zeros(1, 9, 2, 3).int()}, r"b has dtype torch\.int32; accepted"),
        ({"b": torch.zeros(1, 9, 3, 2).transpose(2, 3)}, "b needs a contiguous last dimension"),
        ({"log_decay": torch.zeros(1, 9, 3, device="meta")}, "log_decay is on meta, b on cpu"),
        ({"order": torch.arange(8)}, r"order must be \[9\] int32 or int64"),
        ({"order": torch.zeros(9, dtype=torch.long)}, r"once, starts with \[0, 0"),
        ({"impl": "portable"}, "impl='portable' is not available here"),
    ],
)
def test_a_wrong_call_names_the_value(changes, message):
    b, log_decay = some()
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**{"b": b, "log_decay": log_decay, **changes})
