"""Which dialogues form which micro-batch, on any number of processes: the same optimiser steps on one as on many."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one process, epoch by epoch.

    An optimiser step is `batch_size` dialogues of the epoch's order, cut into micro-batches that the processes take in
    turn. A process that has none left of a step gets an empty one: every process runs the same number of forwards.
    Packed, a step is cut into as many rows of nearly equal length instead.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        n_processes: int,
        seed: int,
        packing: bool,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.n_processes = n_processes
        self.seed = seed
        self.packing = packing
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = len(self.lengths)
        whole, rest = divmod(n, self.batch_size)
        return sum(self._n_micro_batches(size) for size in (self.batch_size,) * whole + (rest,) * bool(rest))

    def _n_micro_batches(self, n_dialogues: int) -> int:
        """Return how many forwards each process runs for a step of so many dialogues."""
        return -(-n_dialogues // (self.micro_batch_size * self.n_processes))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        for begin in range(0, len(order), self.batch_size):
            step = order[begin : begin + self.batch_size]
            n_forwards = self._n_micro_batches(len(step))
            parts = self._packed(step, n_forwards) if self.packing else self._cut(step)
            for i in range(n_forwards):
                place = i * self.n_processes + self.rank
                yield parts[place] if place < len(parts) else []

    def _cut(self, step: list[int]) -> list[list[int]]:
        return [step[i : i + self.micro_batch_size] for i in range(0, len(step), self.micro_batch_size)]

    def _packed(self, step: list[int], n_forwards: int) -> list[list[int]]:
        """Fill the rows greedily, longest dialogue first, each into the shortest row."""
        rows: list[list[int]] = [[] for _ in range(n_forwards * self.n_processes)]
        heap = [(0, i) for i in range(len(rows))]
        for dialogue in sorted(step, key=lambda d: (-self.lengths[d], d)):
            length, i = heapq.heappop(heap)
            rows[i].append(dialogue)
            heapq.heappush(heap, (length + self.lengths[dialogue], i))
        return rows
