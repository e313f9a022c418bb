"""Workers that share the cores of a CPU: all of them for one that works alone, an equal part for each when several do.

Threads that share an image wait for each other at every layer, so that two workers with a thread each answer more than one
with two; but an image that comes alone is answered soonest by all cores. So the threads of a worker follow what the others do.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openset.packing import PackedConv2d


class SharedCores:
    """A worker's part of the cores; it works within ``with``.

    The threads grow where work begins and shrink at any layer after another worker began: growing for the moments between two
    batches of another would take the cores from its decoding.

    A worker holds its place by a lock, which ends with the process. What one that was killed left written there counts until
    the next takes its place.

    Args:
        folder: of these workers alone.
        workers: how many there are.
        cores: to be shared.
        patience: how long to wait for a place, seconds.

    Raises:
        RuntimeError: all places are taken.
    """

    def __init__(self, folder: Path, *, workers: int, cores: int, patience: float = 10.0) -> None:
        self.workers, self.cores = workers, cores
        folder.mkdir(parents=True, exist_ok=True)
        self._place = _take_place(folder, workers, patience)
        with (folder / "working").open("a+b") as file:
            file.truncate(workers)
            self._working = mmap.mmap(file.fileno(), workers)
        self._working[self._place] = 0

    def follow(self, network: nn.Module) -> None:
        """Look at the other workers before every convolution; not for a network that is to be compiled."""
        for module in network.modules():
            if isinstance(module, nn.Conv2d | PackedConv2d):
                module.register_forward_pre_hook(self._before_layer)

    def every_part(self) -> Iterator[int]:
        """Every number of threads that can occur, set while it is yielded: a library may prepare code for each."""
        for working in range(self.workers, 0, -1):
            self._set(self._part(working))
            yield torch.get_num_threads()

    def __enter__(self) -> None:
        self._working[self._place] = 1
        self._set(self._part(self._count()))

    def __exit__(self, *_: object) -> None:
        self._working[self._place] = 0

    def _before_layer(self, module: nn.Module, inputs: Any) -> None:
        self._set(min(torch.get_num_threads(), self._part(self._count())))

    def _count(self) -> int:
        return self._working[:].count(1)

    def _part(self, working: int) -> int:
        return max(1, self.cores // max(1, working))

    def _set(self, threads: int) -> None:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def _take_place(folder: Path, workers: int, patience: float) -> int:
    """The first free one; a predecessor that was just killed may hold its own for a moment."""
    deadline = time.monotonic() + patience
    while True:
        for place in range(workers):
            lock = os.open(folder / f"place-{place}", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                return place  # and the file stays open until the process ends
        if time.monotonic() > deadline:
            raise RuntimeError(f"{folder} has places for {workers} workers, and all are taken")
        time.sleep(0.05)
