"""Anchor and tree are one function; which chunk takes which; the two ways to combine states."""

import pytest
import torch

from metala_vision.kernels.gated_linear_attention import (
    DIRECTIONS,
    chunked,
    gated_linear_attention,
    pairs,
)
from tests._numerics import GATES, SAME, bound, normal, relative_rms
from tests.kernels.test_gated_linear_attention import with_gradients

G, L, K, V = 6, 13, 4, 5


def chunks(D=1, dtype=torch.float64, length=L):
    """Queries, keys and mild log decays of G chunks."""
    q, key = normal(G, length, K, seed=1, dtype=dtype), normal(D, G, length, K, seed=2, dtype=dtype)
    return q, key, -0.3 * normal(D, G, length, K, seed=3, dtype=dtype).abs()


@pytest.mark.parametrize("length", [1, 2, 13, 16])
@pytest.mark.parametrize(
    ("D", "direction"), [(1, d) for d in DIRECTIONS] + [(2, "bidirectional")], ids=str
)
def test_the_anchor_is_the_tree(D, direction, length):
    tensors = chunks(D, length=length)
    weight, queries, keys = pairs.anchor(*tensors, direction)
    expected = pairs.tree(*tensors, direction)
    for ours, tree in zip(
        [weight, *queries, *keys], [expected[0], *expected[1], *expected[2]], strict=True
    ):
        assert ours.shape == tree.shape
        assert relative_rms(ours, tree) <= 1e-14  # exponents below 10, some float64 roundings


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_steep_chunk_takes_the_tree_and_the_others_do_not(direction, monkeypatch):
    q, key, log_decay = chunks(dtype=torch.float32)
    log_decay[0, 2, 5, 0] = -3.0  # one step above the limit
    log_decay[0, 4, :, 1] = -2.0 + 1e-3  # steps below it, their sum above
    seen = []
    tree = pairs.tree
    monkeypatch.setattr(pairs, "tree", lambda q, *a: seen.append(q) or tree(q, *a))
    weight, queries, keys = pairs.by_value(q, key, log_decay, direction)
    steep = torch.tensor([2] if direction == "bidirectional" else [2, 4])  # half of 13 steps is 13
    assert torch.equal(seen[0], q[steep])
    truth = tree(q.double(), key.double(), log_decay.double(), direction)
    for ours, exact in zip(
        [weight, *queries, *keys], [truth[0], *truth[1], *truth[2]], strict=True
    ):
        for chunk in range(G):
            assert relative_rms(ours[chunk], exact[chunk]) <= 2 * SAME


@pytest.mark.parametrize(
    ("change", "form"), [(0.0, "anchor"), (-4.0, "tree"), (float("nan"), "tree")], ids=str
)
def test_all_chunks_of_one_kind_take_one_form(change, form, monkeypatch):
    q, key, log_decay = chunks()
    monkeypatch.setattr(pairs, form, lambda *_: "taken")
    assert pairs.by_value(q, key, log_decay + change, "forward") == "taken"


def test_without_its_limit_the_anchor_breaks_the_error_rule(monkeypatch):
    """What the limit is for: the gradient of a steep gate among mild ones."""
    gate = GATES["hundredth-200-rest+20"](normal(2, 64, 2, 8, seed=3)).float()
    inputs = {n: normal(2, 64, 2, 8, seed=i, dtype=torch.float32) for i, n in enumerate("qv")}
    weight = normal(2, 64, 2, 8, seed=9, dtype=torch.float32)
    exact = {n: x.double() for n, x in inputs.items()}
    truth = with_gradients({**exact, "gate": gate.double()}, weight, "reference")["gate"]

    def error():
        return relative_rms(
            with_gradients({**inputs, "gate": gate}, weight, "chunked")["gate"], truth
        )

    assert error() <= bound(torch.float32, "gate")
    monkeypatch.setattr(pairs, "STEP_LIMIT", float("inf"))
    assert error() > 100 * bound(torch.float32, "gate")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_does_not_change_with_what_it_has_not_seen(direction):
    q, v, gate = (normal(1, 100, 2, e, seed=e, dtype=torch.float32) for e in (K, V, K))
    whole = gated_linear_attention(q, v, gate=gate, direction=direction)
    other = [x.clone() for x in (q, v, gate)]
    unseen = slice(60, None) if direction == "forward" else slice(None, 40)
    seen = slice(None, 60) if direction == "forward" else slice(40, None)
    for x in other:
        x[:, unseen] = normal(*x[:, unseen].shape, seed=7, dtype=torch.float32)
    changed = gated_linear_attention(other[0], other[1], gate=other[2], direction=direction)
    assert torch.equal(changed[:, seen], whole[:, seen])
    assert not torch.equal(changed[:, unseen], whole[:, unseen])
    # a steep gate shortens all chunks: other roundings, the same function
    other[2][:, unseen] = -100.0
    changed = gated_linear_attention(other[0], other[1], gate=other[2], direction=direction)
    assert relative_rms(changed[:, seen], whole[:, seen]) <= SAME


def test_a_default_device_is_not_asked():
    pairs.anchor_tables.cache_clear()
    inputs = [normal(1, 21, 2, e, seed=e, dtype=torch.float32) for e in (K, V, K)]
    expected = gated_linear_attention(inputs[0], inputs[1], gate=inputs[2], impl="reference")
    pairs.anchor_tables.cache_clear()
    for device in ("meta", "cpu"):
        with torch.device(device):
            found = gated_linear_attention(inputs[0], inputs[1], gate=inputs[2])
            k = gated_linear_attention(inputs[0], inputs[1], inputs[2])
        assert relative_rms(found, expected) <= SAME and k.device.type == "cpu"


def test_tracers_are_not_looked_through():
    inputs = [normal(1, 21, 2, e, seed=e, dtype=torch.float32) for e in (K, V, K)]

    def function(q, v, gate):
        return gated_linear_attention(q, v, gate=gate)

    traced = torch.fx.experimental.proxy_tensor.make_fx(function)(*inputs)
    assert relative_rms(traced(*inputs), function(*inputs)) <= SAME


def test_inference_before_training_leaves_nothing_behind():
    pairs.anchor_tables.cache_clear()
    q, v, gate = (normal(1, 21, 2, e, seed=e, dtype=torch.float32) for e in (K, V, K))
    with torch.inference_mode():
        before = gated_linear_attention(q, v, gate=gate)
    after = gated_linear_attention(q.requires_grad_(), v, gate=gate)
    after.sum().backward()
    assert relative_rms(before, after.detach()) <= SAME


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("NC", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_states_by_doubling_and_by_table_are_the_recurrence(NC, reverse, given, grad):
    added, initial = normal(2, NC, K, V, seed=1), normal(2, K, V, seed=2) if given else None
    log_decay = -normal(2, NC, K, seed=3).abs()
    state = torch.zeros(2, K, V).double() if initial is None else initial
    expected = {}
    for c in reversed(range(NC)) if reverse else range(NC):
        expected[c] = state
        state = log_decay[:, c, :, None].exp() * state + added[:, c]
    with torch.set_grad_enabled(grad):
        by_doubling = chunked.states_before(added, log_decay.exp().unsqueeze(3), initial, reverse)
        by_table = chunked.states_by_table(added, log_decay, initial, reverse)
    for states, last in (by_doubling, by_table):
        truth = torch.stack([expected[c] for c in range(NC)], 1)
        assert (states - truth).abs().max() <= 1e-14 * added.abs().max() * NC
        assert relative_rms(last, state) <= 1e-14
