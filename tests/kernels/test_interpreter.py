"""The Triton kernels in Triton's interpreter, on the CPU: `make test-kernels`.

The interpreter has float32 alone. bfloat16 products are the same kernels with operands rounded to
bfloat16's values: DOT "rounded" in kernels/_triton.py.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from metala_vision.kernels._fused import interpreted
from metala_vision.kernels.gated_linear_attention import DIRECTIONS, gated_linear_attention
from tests._numerics import GATES, LENGTHS, SAME, bound, normal, relative_rms
from tests.kernels._cases import MODES, TAU, inputs, mode_errors, truth
from tests.kernels._common import INTERPRETER

if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from metala_vision.kernels import _triton
from metala_vision.kernels._portable import plainly_eager
from metala_vision.kernels.gated_linear_attention import triton_bwd, triton_fwd, triton_states

pytestmark = [*INTERPRETER, pytest.mark.usefixtures("poisoned")]
QUICK = (1, 2, 15, 16, 17, 49)


def run(q, v, gate, d_o, direction, dot):
    """o and the gradients of q, v and gate, by the kernels."""
    call = triton_states.Call(
        q, v, None, gate, "gate", None, TAU, q.shape[3] ** -0.5, direction, dot
    )
    o, launches = triton_fwd.forward_launches(call, q.dtype)
    gradients, more = triton_bwd.backward_launches(call, d_o)
    for launch in (*launches, *more):
        launch.run()
    return {"o": o, "q": gradients["q"], "v": gradients["v"], "gate": gradients["decay"]}


def errors(N, gates, direction, dot, **shape):
    """Relative RMS error of the output and of every gradient."""
    tensors = inputs(N, gates, dtype=torch.bfloat16 if dot == "rounded" else torch.float32, **shape)
    ours, exact = run(*tensors, direction, dot), truth(*tensors, direction)
    return {name: relative_rms(ours[name], exact[name]) for name in exact}


def assert_rule(measured, dot):
    dtype = torch.bfloat16 if dot == "rounded" else torch.float32
    for name, error in measured.items():
        assert error <= bound(dtype, name), (name, error)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("N", QUICK)
def test_every_gate_set_meets_the_rule(N, gates):
    assert_rule(errors(N, gates, "bidirectional", "ieee"), "ieee")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gates", GATES)
def test_bfloat16_products_meet_the_rule(gates, direction):
    assert_rule(errors(33, gates, direction, "rounded"), "rounded")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("gates", GATES)
def test_one_direction_meets_the_rule(gates, direction):
    assert_rule(errors(33, gates, direction, "ieee"), "ieee")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("N", [256, 257])
def test_one_segment_and_two_meet_the_rule(N, direction):
    gates = "half-100-half+8" if direction == "bidirectional" else "N(0,1)"
    assert_rule(errors(N, gates, direction, "ieee", K=16), "ieee")


@pytest.mark.slow
@pytest.mark.parametrize("dot", ["ieee", "rounded"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("N", LENGTHS)
def test_everything_meets_the_rule(N, gates, direction, dot):
    assert_rule(errors(N, gates, direction, dot, H=2, V=64), dot)


@pytest.mark.parametrize(
    ("K", "V", "N"),
    [(1, 1, 20), (5, 3, 20), (32, 64, 40), (33, 65, 20), (64, 128, 20), (128, 100, 17),
     (33, 5, 257)],
)  # fmt: skip
def test_every_width_meets_the_rule(K, V, N):
    measured = errors(N, "half-100-half+8", "bidirectional", "ieee", K=K, V=V)
    assert_rule(measured, "ieee")


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 2), st.integers(1, 3), st.integers(1, 40),
    st.integers(1, 70), st.sampled_from(DIRECTIONS), st.sampled_from(list(GATES)),
)  # fmt: skip
def test_any_shape_meets_the_rule(N, B, H, K, V, direction, gates):
    assert_rule(errors(N, gates, direction, "ieee", B=B, H=H, K=K, V=V), "ieee")


@pytest.mark.parametrize("limit", [1.0, -float("inf")], ids=["tree", "anchor"])
def test_either_form_alone_is_right_for_mild_gates(limit, monkeypatch):
    monkeypatch.setattr(triton_fwd, "ANCHOR_LIMIT", limit)
    for dot in ("ieee", "rounded"):
        assert_rule(errors(40, "N(0,1)", "bidirectional", dot), dot)


def test_the_anchor_without_its_limits_breaks_the_rule(monkeypatch):
    monkeypatch.setattr(triton_fwd, "ANCHOR_LIMIT", -float("inf"))
    monkeypatch.setattr(triton_bwd, "STEP_LIMIT", -float("inf"))
    with pytest.raises(AssertionError), pytest.warns(RuntimeWarning):  # NumPy's, of an overflow
        assert_rule(errors(40, "half-300-half+8", "bidirectional", "ieee"), "ieee")


def test_operands_rounded_alike_are_what_lets_the_anchor_subtract(monkeypatch):
    """Not rounding what is multiplied elementwise leaves the products' rounding in the sums."""
    monkeypatch.setattr(triton_bwd, "STEP_LIMIT", -100.0)
    worst = "hundredth-200-rest+20"
    alike = errors(33, worst, "bidirectional", "rounded")["gate"]
    monkeypatch.setattr(triton_bwd, "operand", lambda x, DOT: x)
    assert errors(33, worst, "bidirectional", "rounded")["gate"] > 2 * alike


def test_rounded_operands_are_bfloat16s():
    x = torch.cat([normal(100, seed=i).float() * 10.0**i for i in range(-30, 31, 6)])
    x = torch.cat([x, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0])])  # ties, both ways
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)))
    y = torch.empty_like(x)

    @_triton.triton.jit
    def kernel(p_x, p_y, DOT: _triton.tl.constexpr):
        o = _triton.tl.arange(0, 2048)
        _triton.tl.store(p_y + o, _triton.operand(_triton.tl.load(p_x + o), DOT))

    kernel[(1,)](x, y, "rounded")
    assert torch.equal(y, x.bfloat16().float())


@pytest.mark.parametrize("value", [-float("inf"), -1e30, -300.0, 300.0, float("inf")])
def test_extreme_gates_stay_finite(value):
    q, v, gate, d_o = inputs(20)
    for dot in ("ieee", "rounded"):
        ours = run(q, v, torch.full_like(gate, value), d_o, "bidirectional", dot)
        assert all(torch.isfinite(x).all() for x in ours.values())


def test_strided_inputs_give_the_same_bits():
    B, N, H, K, V = 2, 20, 2, 8, 16
    q, v, gate, d_o = inputs(N, B=B, H=H, K=K, V=V)
    plain = run(q, v, gate, d_o, "bidirectional", "ieee")
    together = torch.cat([x.flatten(2) for x in (q, gate, v)], 2)  # as one projection gives them
    q2, gate2, v2 = (x.unflatten(2, (H, -1)) for x in together.split([H * K, H * K, H * V], 2))
    q2 = q2.transpose(1, 2).contiguous().transpose(1, 2)  # heads first
    strided = run(
        q2, v2, gate2, d_o.transpose(0, 1).contiguous().transpose(0, 1), "bidirectional", "ieee"
    )
    assert not v2.is_contiguous() and not q2.is_contiguous()
    for name, x in plain.items():
        assert torch.equal(x, strided[name]), name


def test_a_sample_alone_gives_the_bits_it_gives_in_a_batch_and_every_time():
    q, v, gate, d_o = inputs(20, B=2, H=2)
    both = run(q, v, gate, d_o, "bidirectional", "ieee")
    again = run(q, v, gate, d_o, "bidirectional", "ieee")
    second = run(*(x[1:] for x in (q, v, gate, d_o)), "bidirectional", "ieee")
    for name, x in both.items():
        assert torch.equal(x, again[name]) and torch.equal(x[1:], second[name]), name


def test_one_direction_ends_where_the_future_begins():
    """Outputs before a token do not depend on it: to the last bit, unless the form changes."""
    q, v, gate, d_o = inputs(40)
    o = run(q, v, gate, d_o, "forward", "ieee")["o"]
    for later, tolerance in ((gate[:, 20:] + 1, 0.0), (torch.full_like(gate[:, 20:], -300), SAME)):
        changed = torch.cat([gate[:, :20], later], 1)
        other = run(q, v, changed, d_o, "forward", "ieee")["o"]
        assert relative_rms(other[:, :20], o[:, :20]) <= tolerance
        assert relative_rms(other[:, 20:], o[:, 20:]) > 0.1


# Every mode, by the way in: impl="triton".


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_meets_the_rule(mode):
    assert_rule(mode_errors(21, **MODES[mode]), "ieee")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_states_cross_segments(direction):
    measured = mode_errors(270, direction=direction, states=True, key=True, H=1)
    assert_rule(measured, "ieee")


@pytest.mark.slow
@pytest.mark.parametrize("N", [1, 16, 49, 270])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_gate_set_meets_the_rule(mode, gates, N):
    assert_rule(mode_errors(N, gates, **MODES[mode]), "ieee")


@pytest.mark.parametrize("per_head", [False, True])
def test_an_order_inside_gives_the_bits_of_one_outside(per_head):
    N, H = 37, 2
    q, v, gate, d_o = inputs(N, H=H)
    visits = torch.stack([torch.randperm(N) for _ in range(H)])
    visits = visits if per_head else visits[:1].expand(H, N)
    index = visits.t()[None, :, :, None]  # [1, N, H, 1]

    def visit(x):
        return x.gather(1, index.expand(x.shape))

    given = [x.requires_grad_() for x in (q, v, gate)]
    inside = gated_linear_attention(
        q, v, gate=gate, order=visits if per_head else visits[0], impl="triton"
    )
    outside = gated_linear_attention(visit(q), visit(v), gate=visit(gate), impl="triton")
    outside = torch.zeros_like(outside).scatter(1, index.expand(outside.shape), outside)
    assert torch.equal(inside, outside)
    for ours, other in zip(
        torch.autograd.grad(inside, given, d_o), torch.autograd.grad(outside, given, d_o),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, other)


def test_two_segments_with_a_carried_state_are_one_pass():
    q, v, gate, _ = inputs(40)
    options = {"direction": "forward", "impl": "triton", "output_final_state": True}
    whole, last = gated_linear_attention(q, v, gate=gate, **options)
    first, state = gated_linear_attention(q[:, :23], v[:, :23], gate=gate[:, :23], **options)
    second, end = gated_linear_attention(
        q[:, 23:], v[:, 23:], gate=gate[:, 23:], initial_state=state, **options
    )
    assert relative_rms(torch.cat([first, second], 1), whole) <= SAME
    assert relative_rms(end, last) <= SAME


def leaves(**shape):
    q, v, gate, d_o = inputs(20, **shape)
    return [x.requires_grad_() for x in (q, v, gate)], d_o


def test_the_function_takes_the_kernels_by_name_and_agrees_with_the_portable_form():
    results = []
    for impl in ("triton", "chunked"):
        (q, v, gate), d_o = leaves(H=2)
        o = gated_linear_attention(q, v, gate=gate, impl=impl)
        assert ("Fused" in type(o.grad_fn).__name__) == (impl == "triton")
        results.append([o.detach(), *torch.autograd.grad(o, (q, v, gate), d_o)])
    for ours, other in zip(*results, strict=True):
        assert relative_rms(ours, other) <= SAME


def test_auto_leaves_the_interpreter_alone():
    (q, v, gate), _ = leaves()
    o = gated_linear_attention(q, v, gate=gate)
    assert "Fused" not in type(o.grad_fn).__name__


def test_only_the_inputs_are_saved():
    (q, v, gate), _ = leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        gated_linear_attention(q, v, gate=gate, impl="triton")
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (q, v, gate)}
    assert len(saved) == 3


def test_checkpointing_autocast_and_a_gradient_for_one_input():
    (q, v, gate), d_o = leaves()
    plain = torch.autograd.grad(gated_linear_attention(q, v, gate=gate, impl="triton"), gate, d_o)
    with torch.autocast("cpu", torch.bfloat16):
        o = checkpoint(
            lambda: gated_linear_attention(q, v, gate=gate, impl="triton"), use_reentrant=False
        )
        assert o.dtype == torch.float32
    assert torch.equal(torch.autograd.grad(o, gate, d_o)[0], plain[0])


def test_an_expanded_incoming_gradient():
    (q, v, gate), _ = leaves()
    o = gated_linear_attention(q, v, gate=gate, impl="triton")
    of_sum = torch.autograd.grad(o.sum(), q, retain_graph=True)[0]
    assert torch.equal(of_sum, torch.autograd.grad(o, q, torch.ones_like(o))[0])


def test_second_derivatives_are_the_portable_forms():
    results = []
    for impl in ("triton", "chunked"):
        (q, v, gate), d_o = leaves(K=4, V=4)
        o = gated_linear_attention(q, v, gate=gate, impl=impl)
        (first,) = torch.autograd.grad(o, gate, d_o[..., :4], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), q)[0])
    assert relative_rms(*results) <= SAME


def test_a_second_derivative_with_one_input_that_wants_it_under_autocast():
    results = []
    for impl in ("triton", "chunked"):
        q, v, gate, d_o = inputs(20, "N(0,5)", K=4, V=4)
        q.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=impl == "triton"):
            o = gated_linear_attention(q, v, gate=gate, impl=impl)
            (first,) = torch.autograd.grad(o.square(), q, d_o, create_graph=True)
        results.append(torch.autograd.grad(first.sum(), q)[0])
    assert relative_rms(*results) <= SAME


def test_a_key_made_from_the_gate_has_its_own_way_to_it_once():
    (q, v, gate), d_o = leaves(K=4, V=4)
    o = gated_linear_attention(q, v, torch.sigmoid(gate), gate=gate, impl="triton")
    with_graph = torch.autograd.grad(o, gate, d_o, create_graph=True)[0]
    assert relative_rms(with_graph, torch.autograd.grad(o, gate, d_o)[0]) <= SAME


def test_many_gradients_at_once_and_forward_mode():
    (q, v, gate), d_o = leaves(K=4, V=4)
    o = gated_linear_attention(q, v, gate=gate, impl="triton")
    several = torch.stack([d_o, -d_o])
    (both,) = torch.autograd.grad(o, gate, several, is_grads_batched=True, retain_graph=True)
    assert relative_rms(both[0], torch.autograd.grad(o, gate, d_o)[0]) <= SAME
    assert relative_rms(both[1], -both[0]) <= SAME
    state = torch.zeros(1, 1, 4, 4, requires_grad=True)
    _, last = gated_linear_attention(
        q, v, gate=gate, direction="forward", initial_state=state, output_final_state=True,
        impl="triton",
    )  # fmt: skip
    (both,) = torch.autograd.grad(last, state, torch.ones(2, *last.shape), is_grads_batched=True)
    assert torch.isfinite(both).all() and torch.equal(both[0], both[1])
    with pytest.raises(ValueError, match="does not take transforms of functorch"):
        torch.func.grad(lambda q: gated_linear_attention(q, v, gate=gate, impl="triton").sum())(q)
    with torch.autograd.forward_ad.dual_level():
        assert not plainly_eager(q)
    assert plainly_eager(q)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": torch.zeros(1, 4, 1, 8).half(), "v": torch.zeros(1, 4, 1, 8).half()},
            r"does not take torch\.float16 in Triton's interpreter",
        ),
        (
            {"q": torch.zeros(1, 4, 1, 8).double(), "v": torch.zeros(1, 4, 1, 8).double()},
            "impl='triton' does not take float64; accepted: auto, chunked",
        ),
        ({"q": torch.zeros(1, 0, 1, 8), "v": torch.zeros(1, 0, 1, 8)}, "no dimension may be 0"),
        ({"q": torch.zeros(1, 4, 1, 129)}, "K <= 128 and V <= 256 are supported, got K=129"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(changes, message):
    arguments = {"q": torch.zeros(1, 4, 1, 8), "v": torch.zeros(1, 4, 1, 8)}
    arguments["gate"] = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**{**arguments, **changes}, impl="triton")
