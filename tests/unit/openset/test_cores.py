"""Workers that share cores: who has how many threads, and what a worker that dies leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from openset.cores import SharedCores


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_worker_alone_has_all_cores_and_two_have_half_each(tmp_path: Path) -> None:
    first, second = (SharedCores(tmp_path, workers=2, cores=5) for _ in range(2))
    with first:
        assert torch.get_num_threads() == 5
        with second:
            assert torch.get_num_threads() == 2
    with second:
        assert torch.get_num_threads() == 5


def test_threads_shrink_at_the_next_layer_and_grow_with_the_next_batch(tmp_path: Path) -> None:
    first, second = (SharedCores(tmp_path, workers=2, cores=4) for _ in range(2))
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1))
    first.follow(network)
    seen: list[int] = []
    network[1].register_forward_pre_hook(lambda *_: second.__enter__())
    network[2].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with first:
        network(torch.zeros(1, 1, 2, 2))
        second.__exit__(None, None, None)
        network[0](torch.zeros(1, 1, 2, 2))
        assert torch.get_num_threads() == 2
    assert seen == [2]
    with first:
        assert torch.get_num_threads() == 4


def test_every_part_is_set_once(tmp_path: Path) -> None:
    shared = SharedCores(tmp_path, workers=3, cores=4)
    assert [(part, torch.get_num_threads()) for part in shared.every_part()] == [
        (1, 1), (2, 2), (4, 4)
    ]  # fmt: skip


def test_more_workers_than_cores_have_one_thread_each(tmp_path: Path) -> None:
    workers = [SharedCores(tmp_path, workers=3, cores=2) for _ in range(3)]
    with workers[0], workers[1], workers[2]:
        assert torch.get_num_threads() == 1


def test_a_worker_too_many_is_refused(tmp_path: Path) -> None:
    for _ in range(2):
        SharedCores(tmp_path, workers=2, cores=2)
    with pytest.raises(RuntimeError, match="places for 2 workers, and all are taken"):
        SharedCores(tmp_path, workers=2, cores=2, patience=0.1)


def test_the_place_of_a_worker_killed_at_work_is_free_and_idle_again(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from openset.cores import SharedCores\n"
        "with SharedCores(pathlib.Path(sys.argv[1]), workers=2, cores=2):\n"
        "    print('works', flush=True); input()"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"works\n"
    first = SharedCores(tmp_path, workers=2, cores=2)
    with first:
        assert torch.get_num_threads() == 1
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    SharedCores(tmp_path, workers=2, cores=2)
    with first:
        assert torch.get_num_threads() == 2
