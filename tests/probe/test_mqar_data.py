"""Associative recall's examples, against their definition."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metala_vision.probe.mqar_data import IGNORED, SPLITS, RecallTask, recall_examples


@st.composite
def tasks(draw):
    pairs = draw(st.integers(1, 9))
    return RecallTask(
        draw(st.integers(4 * pairs, 4 * pairs + 40)), pairs,
        draw(st.integers(2 * pairs + 2, 60)), draw(st.floats(0.01, 2)), draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(tasks(), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(SPLITS))
def test_an_example_is_its_definition(task, count, seed, split):
    tokens, targets = recall_examples(task, count, seed, split)
    assert tokens.shape == targets.shape == (count, task.length)
    P, half = task.pairs, task.vocab // 2
    for sequence, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values = sequence[0 : 2 * P : 2], sequence[1 : 2 * P : 2]
        assert len(set(keys)) == len(set(values)) == P  # without replacement
        assert all(1 <= key < half for key in keys)
        assert all(half <= value < task.vocab for value in values)
        asked = [t for t, answer in enumerate(target) if answer != IGNORED]
        assert len(asked) == P and min(asked) >= 2 * P
        assert all((t - 2 * P) % 2 == 0 and t + 1 < task.length for t in asked)  # starts of slots
        told = dict(zip(keys, values, strict=True))
        assert {sequence[t]: target[t] for t in asked} == told
        others = [sequence[t] for t in range(2 * P, task.length) if t not in asked]
        assert all(0 <= token < task.vocab for token in others)
        assert task.random_non_queries or not any(others)
    again = recall_examples(task, count, seed, split)
    assert np.array_equal(again[0], tokens) and np.array_equal(again[1], targets)


def test_no_two_sets_share_their_random_numbers():
    task = RecallTask(64, 8, 8192)
    seen = {
        recall_examples(task, 4, seed, split)[0].tobytes() for seed in range(8) for split in SPLITS
    }
    assert len(seen) == 16


def share_of_slots(power, slots, examples=20_000):
    """How often each slot holds the question of a single pair."""
    _, targets = recall_examples(RecallTask(2 + 2 * slots, 1, 4, power), examples, 0, "train")
    asked = np.nonzero(targets != IGNORED)[1]
    return np.bincount((asked - 2) // 2, minlength=slots) / examples


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_slots_have_their_weights(power):
    """Hoeffding: a share of n draws is off by d with a chance of at most 2 exp(-2 n d^2)."""
    slots, examples = 12, 20_000
    weight = np.arange(1, slots + 1) ** (power - 1.0)
    bound = math.sqrt(math.log(2 * slots / 1e-9) / (2 * examples))  # 0.024
    share = share_of_slots(power, slots, examples)
    assert np.abs(share - weight / weight.sum()).max() <= bound
    if power < 1:
        assert share[0] - share[-1] > 2 * bound  # near ones are favoured
        assert np.abs(share - 1 / slots).max() > bound  # which the bound would notice


def test_keys_values_and_their_sequence_are_uniform():
    """The same bound, of every key and value at the first and the last of three places."""
    examples, P, vocab = 20_000, 3, 12
    tokens, _ = recall_examples(RecallTask(12, P, vocab), examples, 1, "test")
    bound = math.sqrt(math.log(2 * 4 * 6 / 1e-9) / (2 * examples))
    for place, first, count in ((0, 1, 5), (4, 1, 5), (1, 6, 6), (5, 6, 6)):
        share = np.bincount(tokens[:, place] - first, minlength=count) / examples
        assert len(share) == count and np.abs(share - 1 / count).max() <= bound


def test_the_second_slot_is_drawn_without_the_first():
    """Of two slots with weights 1 and w both are taken; the first pair's is the first w.p. 1 / (1
    + w): the draws are one after the other."""
    examples, power = 20_000, 0.01
    tokens, _ = recall_examples(RecallTask(8, 2, 6, power), examples, 2, "train")
    first = (tokens[:, 4] == tokens[:, 0]).mean()
    expected = 1 / (1 + 2 ** (power - 1))
    assert abs(first - expected) <= math.sqrt(math.log(2 / 1e-9) / (2 * examples))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((31, 8), "8 pairs and their questions need a length of 32 or more, got 31"),
        ((64, 0), "at least one pair is needed, got 0"),
        ((64, 8, 17), "8 pairs need a vocabulary of 18 or more tokens, half of them keys, got 17"),
        ((64, 8, 64, 0.0), "power must be a number above 0, got 0.0"),
        ((64, 8, 64, math.nan), "power must be a number above 0, got nan"),
    ],
)
def test_a_task_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        RecallTask(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("count", "seed", "split", "message"),
    [
        (0, 0, "train", "count must be >= 1"), (1, -1, "train", "seed >= 0"),
        (1, 0, "val", "split='val' is unknown; accepted: train, test"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_is_refused(count, seed, split, message):
    with pytest.raises(ValueError, match=message):
        recall_examples(RecallTask(64, 8), count, seed, split)
