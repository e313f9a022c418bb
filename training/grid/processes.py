"""Several processes that share one grid: the one that was started, and others of the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

PART = "--part"
_ROOT = Path(__file__).parents[2]


@contextmanager
def helpers(
    arguments: Sequence[str], processes: int, cores: Sequence[set[int]] | None = None
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The other processes: each runs the same command as a part, and ends when this one ends.

    Left by an exception, they are told to save and end; left either way, they are waited for.

    Args:
        arguments: of the command line.
        processes: how many there are with this one.
        cores: of each, this one first; None leaves all to all.
    """
    children: list[subprocess.Popen[bytes]] = []
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        for number in range(1, processes):
            if cores is not None:
                os.sched_setaffinity(0, cores[number])  # the child has it from its start
            child = subprocess.Popen(
                [sys.executable, "-m", "training.reproduce", *arguments, PART, str(number + 1)],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                # Ctrl-C then reaches this process alone, which tells the others, once.
                start_new_session=True,
            )
            children.append(child)
        if cores is not None:
            os.sched_setaffinity(0, cores[0])
        yield children
    except BaseException:  # Ctrl-C and a failure here end the others too
        for child in children:
            child.terminate()
        raise
    finally:
        wait_for(children)


def wait_for(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended; the highest exit code, 1 for one that was killed."""
    codes = [child.wait() for child in children]
    for child in children:
        if child.stdin is not None:
            child.stdin.close()
    return max((code if code >= 0 else 1 for code in codes), default=0)


def cores_of(processes: int) -> list[set[int]]:
    """The cores of this process, divided; where there are fewer cores than processes, all share all."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < processes:
        return [set(cores)] * processes
    bounds = [len(cores) * number // processes for number in range(processes + 1)]
    return [set(cores[low:high]) for low, high in pairwise(bounds)]


def end_with_parent() -> None:
    """End this process, as SIGTERM does, when the one that started it is gone and the pipe between them with it."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
