"""Batches by step number, made in the background.

A batch is made from its step number alone (and the seed): which edits, which of their questions, in which
order. So a run that is resumed, or spread over other processes, sees what it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import EditSample
from .parts import Batch


@dataclass(frozen=True)
class Feed:
    """Batches by step number, for one of `processes` processes.

    Attributes:
        make: samples and their generators to a batch.
        batch_size: edits in a step, over all processes; accumulate: batches of a step in this process.
        shuffle: take the samples in a new order each time they have all come; else in their own.
        once: each sample comes once (held-out edits).
    """

    samples: Sequence[EditSample]
    make: Callable[[Sequence[EditSample], Sequence[torch.Generator]], Batch]
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    process: int = 0
    processes: int = 1
    shuffle: bool = True
    once: bool = False

    def __post_init__(self):
        share = self.processes * self.accumulate
        if self.batch_size % share:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided by {self.processes} processes times "
                f"accumulate={self.accumulate}: pass a multiple of {share}."
            )

    def numbers(self, step: int) -> list[int]:
        """The samples of a step, all processes together."""
        count = len(self.samples)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        if self.once:
            places = [place for place in places if place < count]
        if not self.shuffle:
            return [place % count for place in places]
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return [int(orders[place // count][place % count]) for place in places]

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.samples), generator=self._generator(-1 - epoch))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_000_007 + number) % 2**63)

    def steps_of_all(self) -> int:
        """Steps in which every sample comes once."""
        return -(-len(self.samples) // self.batch_size)

    def batches(self, step: int) -> list[Batch]:
        """This process's batches of a step; fewer, or none, where samples that come once run out."""
        numbers = self.numbers(step)
        mine = [
            (numbers[i], step * self.batch_size + i)
            for i in range(self.process, len(numbers), self.processes)
        ]
        size = self.batch_size // (self.processes * self.accumulate)
        made = []
        for begin in range(0, len(mine), size):
            chosen = mine[begin : begin + size]
            generators = [self._generator(place) for _, place in chosen]
            made.append(self.make([self.samples[number] for number, _ in chosen], generators))
        return made

    def ahead(self, start: int, stop: int, depth: int = 2) -> Iterator[list[Batch]]:
        """The batches of the steps from `start` to `stop`.

        They are made in the background, up to `depth` steps ahead: pictures are opened and text is tokenized
        while the model computes.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="dualedit-batches")
        coming: deque[Future[list[Batch]]] = deque()
        try:
            for step in range(start, stop):
                coming.append(pool.submit(self.batches, step))
                if len(coming) > depth:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
