"""Multi-query associative recall: pairs of key and value, and later each key as a question.

M examples, N tokens each, P pairs.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

IGNORED = -100  # the target where nothing is asked
SPLITS = ("train", "test")


@dataclass(frozen=True)
class RecallTask:
    """What an example is.

    Args:
        length: N, at least 4 pairs.
        pairs: P, at least 1.
        vocab: number of tokens; 0 is the filler, 1 ... vocab / 2 - 1 are keys, the rest values.
        power: a > 0: a question stands in the i-th slot behind the pairs (i = 1, 2, ...) with a
            weight of i^(a - 1); the smaller a, the sooner, 1 is anywhere.
        random_non_queries: random tokens of the whole vocabulary instead of the filler.
    Raises:
        ValueError: naming the value and what is accepted.
    """

    length: int
    pairs: int
    vocab: int = 8192
    power: float = 0.01
    random_non_queries: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"at least one pair is needed, got {self.pairs}")
        if self.length < 4 * self.pairs:
            raise ValueError(
                f"{self.pairs} pairs and their questions need a length of {4 * self.pairs} or "
                f"more, got {self.length}"
            )
        if self.vocab < 2 * self.pairs + 2:
            raise ValueError(
                f"{self.pairs} pairs need a vocabulary of {2 * self.pairs + 2} or more tokens, "
                f"half of them keys, got {self.vocab}"
            )
        if not 0 < self.power < inf:
            raise ValueError(f"power must be a number above 0, got {self.power}")


def recall_examples(
    task: RecallTask, count: int, seed: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, int64 [M, N] each, the same for the same arguments.

    The tokens begin with the pairs, k_1 v_1 k_2 v_2 ...; keys and values are drawn without
    replacement. Behind them lie (N - 2 P) / 2 slots of two tokens. P of them are drawn one after
    the other without replacement, the i-th with a weight of i^(a - 1), and k_1, k_2, ... stand at
    the starts of those; everything else is filler. The target of a key's second place is its value,
    which is not shown there; every other target is -100.

    Source: Zoology, arXiv 2312.04927, section 3 and the data of its release. Decided here, as no
    text settles it: the last token of an odd length belongs to no slot.

    Args:
        count: M, at least 1.
        seed: 0 or more. split: "train" or "test"; no two of (seed, split) share random numbers.
    Raises:
        ValueError: naming the value and what is accepted.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; accepted: {', '.join(SPLITS)}")
    if count < 1 or seed < 0:
        raise ValueError(f"count must be >= 1 and seed >= 0, got {count} and {seed}")
    random = np.random.default_rng([seed, SPLITS.index(split)])
    P, half = task.pairs, task.vocab // 2
    keys = 1 + _distinct(random, count, P, half - 1)
    values = half + _distinct(random, count, P, task.vocab - half)
    asked = 2 * P + 2 * _slots(random, count, P, (task.length - 2 * P) // 2, task.power)

    if task.random_non_queries:
        tokens = random.integers(0, task.vocab, (count, task.length))
    else:
        tokens = np.zeros((count, task.length), np.int64)
    tokens[:, 0 : 2 * P : 2] = keys
    tokens[:, 1 : 2 * P : 2] = values
    np.put_along_axis(tokens, asked, keys, 1)
    targets = np.full((count, task.length), IGNORED, np.int64)
    np.put_along_axis(targets, asked, values, 1)
    return tokens, targets


def _distinct(random: np.random.Generator, rows: int, count: int, total: int) -> np.ndarray:
    """[rows, count] of range(total), distinct in each row, every sequence as likely.

    Floyd's sampling, a column at a time, then shuffled: the vocabulary may be large.
    """
    chosen = np.empty((rows, count), np.int64)
    for i in range(count):
        last = total - count + i
        drawn = random.integers(0, last + 1, rows)
        there = (chosen[:, :i] == drawn[:, None]).any(1)
        chosen[:, i] = np.where(there, last, drawn)
    return random.permuted(chosen, axis=1)


def _slots(
    random: np.random.Generator, rows: int, count: int, total: int, power: float
) -> np.ndarray:
    """[rows, count] of range(total), drawn without replacement with weights (i + 1)^(power - 1).

    The largest of log weight + Gumbel noise, largest first, are such a sequence of draws.
    """
    log_weight = (power - 1) * np.log(np.arange(1, total + 1))
    found = np.empty((rows, count), np.int64)
    for start in range(0, rows, 4096):  # some megabytes at a time
        part = found[start : start + 4096]
        noisy = log_weight + random.gumbel(size=(len(part), total))
        part[:] = np.argsort(-noisy, axis=1)[:, :count]
    return found
