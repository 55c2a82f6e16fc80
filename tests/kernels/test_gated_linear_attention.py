"""The portable form of gated linear attention against the recurrence in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metala_vision.kernels.gated_linear_attention import (
    DIRECTIONS,
    decay_and_key,
    gated_linear_attention,
    gated_linear_attention_op,
)
from tests._numerics import GATES, LENGTHS, SAME, bound, normal, relative_rms

B, H, K, V = 2, 2, 8, 12


def with_gradients(inputs, weight, impl, **options):
    """Output and gradients of a weighted sum of it, as {name: tensor}."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o = gated_linear_attention(**leaves, **options, impl=impl)
    o.backward(weight.to(o.dtype))
    return {"o": o.detach(), **{name: x.grad for name, x in leaves.items()}}


def assert_error_rule(inputs, dtype, **options):
    rounded = {name: x.to(dtype) for name, x in inputs.items()}
    shape = (*inputs["q"].shape[:3], inputs["v"].shape[3])
    weight = normal(*shape, seed=9).to(dtype)
    exact = {name: x.double() for name, x in rounded.items()}
    truth = with_gradients(exact, weight.double(), "reference", **options)
    ours = with_gradients(rounded, weight, "chunked", **options)
    for name, value in ours.items():
        error = relative_rms(value, truth[name])
        assert error <= bound(dtype, name), f"{name}: relative RMS {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", LENGTHS)
def test_error_rule_at_normal_gates(N, dtype):
    inputs = {
        "q": normal(B, N, H, K, seed=1),
        "v": normal(B, N, H, V, seed=2),
        "gate": normal(B, N, H, K, seed=3),
    }
    assert_error_rule(inputs, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gates", [name for name in GATES if name != "N(0,1)"])
@pytest.mark.parametrize("N", [17, 196])
def test_error_rule_at_extreme_gates(N, gates, direction):
    inputs = {
        "q": normal(B, N, H, K, seed=1),
        "v": normal(B, N, H, V, seed=2),
        "gate": GATES[gates](normal(B, N, H, K, seed=3)),
    }
    assert_error_rule(inputs, torch.float32, direction=direction)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("gates", "dtype"),
    [
        (gates, dtype)
        for gates in GATES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        # keys of 1e-10, and outputs with them, are 0 in float16
        if (gates, dtype) != ("hundredth-200-rest+20", torch.float16)
    ],
    ids=str,
)
@pytest.mark.parametrize("N", LENGTHS)
def test_error_rule_everywhere(N, gates, dtype, direction):
    inputs = {
        "q": normal(B, N, H, K, seed=1),
        "v": normal(B, N, H, V, seed=2),
        "gate": GATES[gates](normal(B, N, H, K, seed=3)),
    }
    assert_error_rule(inputs, dtype, direction=direction)


def test_finite_up_to_gate_300():
    inputs = {name: normal(1, 70, H, K, seed=i, dtype=torch.float32) for i, name in enumerate("qv")}
    for value in (300.0, -300.0):
        gate = torch.full_like(inputs["q"], value)
        result = with_gradients({**inputs, "gate": gate}, torch.ones_like(inputs["v"]), "chunked")
        assert all(torch.isfinite(x).all() for x in result.values())


def modes(N, seed=0):
    """Every way to give key and decay, as {name: arguments}."""
    gate, two = normal(B, N, H, K, seed=seed + 3), normal(2, B, N, H, K, seed=seed + 4)
    k = normal(B, N, H, K, seed=seed + 5)
    return {
        "gate": {"gate": gate},
        "gate-key": {"gate": gate, "k": k},
        "log_decay": {"log_decay": -gate.abs()},
        "log_decay-key": {"log_decay": -gate.abs(), "k": k},
        "undecayed": {"k": k},
        "two-gates": {"gate": two},
        "two-gates-key": {"gate": two, "k": k},
        "two-log-decays": {"log_decay": -two.abs()},
    }


@pytest.mark.parametrize(
    ("mode", "direction"),
    [(m, d) for m in modes(1) for d in DIRECTIONS if d == "bidirectional" or "two" not in m],
)
@pytest.mark.parametrize("N", [1, 33, 70])
def test_every_mode_equals_the_recurrence(N, mode, direction):
    arguments = modes(N)[mode]
    inputs = {"q": normal(B, N, H, K, seed=1), "v": normal(B, N, H, V, seed=2), **arguments}
    weight = normal(B, N, H, V, seed=9)
    truth = with_gradients(inputs, weight, "reference", direction=direction)
    ours = with_gradients(inputs, weight, "chunked", direction=direction)
    for name, value in ours.items():
        # float64 and about 100 operations on the way; -expm1's own gradient in the reference is
        # exact to eps / alpha, alpha > 1e-2 here
        assert relative_rms(value, truth[name]) <= 1e-12, name


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_bidirectional_is_a_causal_pass_plus_a_flipped_causal_pass(impl):
    q, v, gate = normal(B, 70, H, K, seed=1), normal(B, 70, H, V, seed=2), normal(B, 70, H, K)
    both = gated_linear_attention(q, v, gate=gate, impl=impl)
    forward = gated_linear_attention(q, v, gate=gate, direction="forward", impl=impl)
    flipped = gated_linear_attention(
        q.flip(1), v.flip(1), gate=gate.flip(1), direction="forward", impl=impl
    ).flip(1)
    assert relative_rms(both, forward + flipped) <= 1e-14  # sums of float64 in another order
    backward = gated_linear_attention(q, v, gate=gate, direction="backward", impl=impl)
    assert relative_rms(backward, flipped) <= 1e-14


def test_reference_is_the_printed_recurrence_by_hand():
    """Two tokens, K = V = 1, worked out on paper: shares nothing with either form."""
    q, v = torch.tensor([[2.0, 3.0]]).double(), torch.tensor([[5.0, 7.0]]).double()
    alpha = torch.tensor([[0.5, 0.25]]).double()
    shape = (1, 2, 1, 1)
    o = gated_linear_attention(
        q.view(shape), v.view(shape), log_decay=alpha.log().view(shape), scale=1.0,
        direction="forward", impl="reference",
    )  # fmt: skip
    s1 = 0.5 * 5.0  # (1 - alpha_1) v_1
    s2 = 0.25 * s1 + 0.75 * 7.0
    torch.testing.assert_close(o.flatten(), torch.tensor([2.0 * s1, 3.0 * s2]).double())


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_two_segments_with_carried_state_are_one_pass(direction, impl):
    N, cut = 90, 37
    q, v, gate = normal(B, N, H, K, seed=1), normal(B, N, H, V, seed=2), normal(B, N, H, K)
    options = {"direction": direction, "output_final_state": True, "impl": impl}
    whole, last = gated_linear_attention(q, v, gate=gate, **options)
    parts = [slice(0, cut), slice(cut, N)]
    state, outputs = None, {}
    for part in parts if direction == "forward" else reversed(parts):
        outputs[part.start], state = gated_linear_attention(
            q[:, part], v[:, part], gate=gate[:, part], initial_state=state, **options
        )
    assert relative_rms(torch.cat([outputs[0], outputs[cut]], 1), whole) <= 1e-13
    assert relative_rms(state, last) <= 1e-13


def test_a_sample_alone_is_the_sample_in_a_batch():
    q, v, gate = (normal(3, 70, H, e, seed=e, dtype=torch.float32) for e in (K, V, K))
    batch = gated_linear_attention(q, v, gate=gate)
    alone = gated_linear_attention(q[1:2], v[1:2], gate=gate[1:2])
    # not bit-equal: the library picks its product by the batch; both are within the rule
    assert relative_rms(alone, batch[1:2]) <= 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("per_head", [False, True])
def test_an_order_is_gather_then_operator_then_scatter(per_head, direction):
    N = 50
    q, v, gate = normal(B, N, H, K, seed=1), normal(B, N, H, V, seed=2), normal(B, N, H, K)
    orders = torch.stack([torch.randperm(N) for _ in range(H)])
    order = orders.int() if per_head else orders[0]
    for impl in ("chunked", "reference"):
        ours = gated_linear_attention(q, v, gate=gate, order=order, direction=direction, impl=impl)
        for h in range(H):
            seen = orders[h if per_head else 0]
            heads = slice(h, h + 1)
            moved = gated_linear_attention(
                q[:, seen, heads], v[:, seen, heads], gate=gate[:, seen, heads],
                direction=direction, impl=impl,
            )  # fmt: skip
            assert relative_rms(ours[:, seen, heads], moved) <= 1e-14


@pytest.mark.parametrize("mode", ["gate", "gate-key", "two-gates"])
def test_gradcheck_in_float64(mode):
    arguments = {k: x[..., :3].contiguous() for k, x in modes(5)[mode].items()}
    names = ["q", "v", *arguments]
    tensors = [normal(B, 5, H, 3, seed=1), normal(B, 5, H, 2, seed=2), *arguments.values()]

    def function(*xs):
        return gated_linear_attention(**dict(zip(names, xs, strict=True)), impl="chunked")

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 80),
    k=st.integers(1, 9),
    v=st.integers(1, 9),
    heads=st.integers(1, 3),
    seed=st.integers(0, 99),
    strided=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
)
def test_any_shape_and_stride(n, k, v, heads, seed, strided, direction):
    widths = [heads * k, heads * k, heads * v]
    packed = normal(2, n, sum(widths), seed=seed)
    q, gate, value = packed.split(widths, dim=2)
    q, gate, value = q.view(2, n, heads, k), gate.view(2, n, heads, k), value.view(2, n, heads, v)
    if not strided:
        q, gate, value = q.contiguous(), gate.contiguous(), value.contiguous()
    truth = gated_linear_attention(q, value, gate=gate, direction=direction, impl="reference")
    ours = gated_linear_attention(q, value, gate=gate, direction=direction, impl="chunked")
    assert relative_rms(ours, truth) <= 1e-12


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_log_decay_of_minus_infinity_forgets_everything(direction):
    q, v, k = normal(1, 70, H, K, seed=1), normal(1, 70, H, V, seed=2), normal(1, 70, H, K, seed=3)
    log_decay = -normal(1, 70, H, K).abs()
    log_decay[:, 40] = -torch.inf
    inputs = {"q": q, "v": v, "k": k, "log_decay": log_decay}
    weight = normal(1, 70, H, V, seed=9)
    truth = with_gradients(inputs, weight, "reference", direction=direction)
    ours = with_gradients(inputs, weight, "chunked", direction=direction)
    for name, value in ours.items():
        if name == "log_decay":  # the reference's own is 0 * inf there
            value[:, 40] = truth[name][:, 40] = 0
        assert relative_rms(value, truth[name]) <= 1e-12, name


def test_compiles_without_a_graph_break():
    q, v, gate = (normal(B, 70, H, e, seed=e, dtype=torch.float32) for e in (K, V, K))
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="aot_eager")
    # bit-equal from torch 2.7 on (test_library.py); before, the graph takes the tree
    eager = gated_linear_attention(q, v, gate=gate)
    assert relative_rms(compiled(q, v, gate=gate), eager) <= SAME
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_rms(compiled(q, v, gate=gate), eager) <= SAME


def test_autocast_leaves_the_exponents_alone():
    q, v, gate = (normal(B, 64, H, e, seed=e, dtype=torch.float32) for e in (K, V, K))
    outside = gated_linear_attention(q, v, gate=gate)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gated_linear_attention(q, v, gate=gate)
    assert torch.equal(inside, outside)


def test_the_key_is_exact_near_zero_and_its_gradient_where_alpha_vanishes():
    gate = torch.tensor([30.0, -300.0, 0.0], requires_grad=True)
    log_decay, key = decay_and_key(gate, 16.0)
    key.sum().backward()
    g = gate.detach().double()
    alpha = torch.sigmoid(g) ** (1 / 16)
    exact_key = -torch.expm1(torch.nn.functional.logsigmoid(g) / 16)
    exact_gradient = -alpha * torch.sigmoid(-g) / 16
    torch.testing.assert_close(key.detach().double(), exact_key, rtol=1e-6, atol=0)
    torch.testing.assert_close(gate.grad.double(), exact_gradient, rtol=1e-5, atol=0)
    torch.testing.assert_close(log_decay.detach().exp().double(), alpha, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_operator_scripts_to_the_same_numbers():
    scripted = torch.jit.script(gated_linear_attention_op)
    q, v, gate = (normal(B, 70, H, e, seed=e, dtype=torch.float32) for e in (K, V, K))
    for direction in DIRECTIONS:
        arguments = (q, v, None, gate, None, 16.0, K**-0.5, direction, None)
        eager = gated_linear_attention_op(*arguments)  # takes the anchor, the script the tree
        assert relative_rms(scripted(*arguments), eager) <= SAME


def test_functional_gradients_and_vmap_are_the_eager_ones():
    q, v, gate = (normal(B, 33, H, e, seed=e) for e in (K, V, K))

    def loss(q, v, gate):
        return gated_linear_attention(q, v, gate=gate).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, v, gate)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    functional = torch.func.grad(loss, argnums=(0, 1, 2))
    for ours, truth in zip(functional(q, v, gate), expected, strict=True):
        assert relative_rms(ours, truth) <= 1e-13
    # per-sample gradients: samples do not mix, so they are the rows of the whole gradient
    one_by_one = torch.func.vmap(lambda *x: functional(*(t.unsqueeze(0) for t in x)))(q, v, gate)
    for ours, truth in zip(one_by_one, expected, strict=True):
        assert relative_rms(ours.squeeze(1), truth) <= 1e-13


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_gradients_are_right(direction):
    tensors = [normal(1, 5, 1, e, seed=e).requires_grad_() for e in (2, 3, 2)]

    def function(q, v, gate):
        return gated_linear_attention(q, v, gate=gate, direction=direction, impl="chunked")

    assert torch.autograd.gradgradcheck(function, tensors)
