"""Which image a step sees and how it is augmented: functions of (seed, epoch, place), no state.

A place is a sample's position in the order of an epoch. Whatever process, worker or resumed run
draws a sample, it gets the same pixels.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler, get_worker_info

# What a stream of random numbers is for: no two share one.
ORDER, AUGMENTATION, MIXING, REPLACEMENT, PROCESS, NOISE, ON_DEVICE = range(7)


class Key(NamedTuple):
    """One sample of an epoch; what a training dataset is indexed by."""

    epoch: int
    place: int
    index: int  # of the dataset


class Loader(Protocol):
    """What an epoch draws its batches from."""

    @property
    def dataset(self) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


def stream(seed: int, purpose: int, *where: int) -> np.random.SeedSequence:
    """The random numbers of one purpose at one place."""
    return np.random.SeedSequence((seed, purpose, *where))


@contextmanager
def seeded(sequence: np.random.SeedSequence) -> Iterator[None]:
    """random, numpy and torch draw from `sequence` inside, and go on as before behind it (not in a
    worker, where every sample is seeded).

    timm's augmentations and mixing draw from all three.
    """
    words = sequence.generate_state(3, np.uint64)
    # A worker of a loader draws nothing else.
    alone = get_worker_info() is not None
    before: Any = None
    if not alone:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)  # a quarter of the time that all 64 bits take
    # manual_seed would seed every GPU too.
    torch.default_generator.manual_seed(int(words[2] >> np.uint64(1)))
    try:
        yield
    finally:
        if not alone:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


class EpochBatches(Sampler[list[Key]]):
    """Shuffled batches of an epoch, a function of (seed, epoch), and of a process its part of each.

    With `repeats` above 1 every image that an epoch draws comes so many times, each time augmented
    anew, one behind the other, and an epoch draws as many samples as without: repeated
    augmentation (arXiv 1902.05509; as DeiT, arXiv 2012.12877, takes it).

    A step's places are the same for any number of processes. Process r of w takes, of the first and
    of the second half of them, the r-th w-th from the front and from the back: the images that
    timm's mixing pairs, one from either end of the batch, are on one process.

    Args:
        num_images: in the dataset.
        batch_size: images of a batch on one process; an incomplete last one is dropped, unless it
            is the only one.
        seed: of the run.
        repeats: samples of an image.
        rank, world: this process and the number of processes.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, repeats: int = 1, rank: int = 0,
        world: int = 1,
    ) -> None:  # fmt: skip
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.rank, self.world = rank, world
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Of the next iteration, which begins with the epoch's `first`-th batch."""
        self.epoch, self.first = epoch, first

    def order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch's samples, by place."""
        generator = np.random.Generator(np.random.PCG64(stream(self.seed, ORDER, epoch)))
        return generator.permutation(self.num_images).repeat(self.repeats)[: self.num_images]

    def places(self, batch: int) -> range:
        """Of the epoch's `batch`-th batch, over all processes."""
        size = self.batch_size * self.world
        stop = min((batch + 1) * size, self.num_images)
        start = batch * size
        return range(start, stop - (stop - start) % self.world)

    def own(self, batch: int) -> list[int]:
        """Those of this process."""
        places = self.places(batch)
        count = len(places) // self.world
        if count % 2:
            return list(places[self.rank * count : (self.rank + 1) * count])
        half = count // 2
        front = places[self.rank * half : (self.rank + 1) * half]
        back = len(places) - self.rank * half
        return [*front, *places[back - half : back]]

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order(self.epoch)
        for batch in range(self.first, len(self)):
            yield [Key(epoch, place, int(order[place])) for place in self.own(batch)]

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return max(1, self.num_images // (self.batch_size * self.world))


class EvaluationOrder(Sampler[int]):
    """Every position once over all processes, and equally many on each: where they do not divide, a
    process gets the position `num_images`, which is no image.
    """

    def __init__(self, num_images: int, rank: int = 0, world: int = 1) -> None:
        self.num_images, self.rank, self.world = num_images, rank, world

    def __iter__(self) -> Iterator[int]:
        for i in range(len(self)):
            yield min(i * self.world + self.rank, self.num_images)

    def __len__(self) -> int:
        return -(-self.num_images // self.world)
