"""Steps of training on a CPU under different ways to take and give back memory, side by side.

    python benchmarks/allocator.py [--precision float32] [--json FILE]

Every way is a process of its own with the same network and images; all are asked for a step in turn, so that what disturbs
the machine disturbs all alike. The Makefile's targets that train have "memory kept": what is freed stays with the process.
tcmalloc and jemalloc are what PyTorch's tuning guide suggests; they are measured where they are installed.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from benchmarks.precision import step_seconds
from benchmarks.training.rows import Row, Table

_USUAL = "as it comes"
_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
_HUGE = {"THP_MEM_ALLOC_ENABLE": "1"}
SETTINGS = {
    _USUAL: {},
    "huge pages": _HUGE,
    "memory kept": _KEPT,
    "memory kept, huge pages": {**_KEPT, **_HUGE},
}
LIBRARIES = {"tcmalloc_minimal": "libtcmalloc-minimal4", "jemalloc": "libjemalloc2"}


@dataclass(frozen=True)
class Step:
    """What a process trains with."""

    network: str
    batch_size: int
    image_size: int
    channels: int
    precision: str

    def __str__(self) -> str:
        return f"{self.network} step, CPU, batch {self.batch_size}, {self.image_size} px, {self.precision}"


def settings() -> dict[str, dict[str, str] | None]:
    """Environment of each way by its name; None where a library is not installed."""
    found = {name: ctypes.util.find_library(name) for name in LIBRARIES}
    return {**SETTINGS, **{name: {"LD_PRELOAD": file} if file else None for name, file in found.items()}}  # fmt: skip


@contextmanager
def worker(step: Step, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes a step for every line that it reads and answers with seconds and its peak memory in bytes."""
    cleared = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name not in ("LD_PRELOAD", "GLIBC_TUNABLES", *_HUGE)
    }
    command = [sys.executable, __file__, "--worker", json.dumps(vars(step))]
    # Unbuffered: nothing is left to be written to a process that has ended.
    with subprocess.Popen(
        command, env={**cleared, **environment}, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[bytes]) -> tuple[float, int]:
    """One step: seconds, peak resident bytes.

    Raises:
        RuntimeError: the process ended, for want of memory for instance.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(b"step\n")
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a process ended with status {process.wait()}; try a smaller --batch")
    seconds, peak = answer.split()
    return float(seconds), int(peak)


def answer_steps(step: Step) -> None:
    """The loop of such a process; Ctrl-C is for the one that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    taken = step_seconds("cpu", **vars(step))
    for _ in sys.stdin:
        seconds = next(taken)
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


def measure(step: Step, repeats: int) -> list[Row]:
    """A row for each way; the first two steps, which take the memory, are left out."""
    ways = settings()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    peak: dict[str, int] = {}
    with ExitStack() as running:
        processes = {
            name: running.enter_context(worker(step, environment))
            for name, environment in ways.items()
            if environment is not None
        }
        for turn in range(repeats + 2):
            for name, process in processes.items():
                seconds, peak[name] = ask(process)
                if turn >= 2:
                    taken[name].append(seconds)
    usual = statistics.median(taken[_USUAL])
    rows = []
    for name, values in taken.items():
        if not values:
            command = f"apt-get install {LIBRARIES[name]}, then again"
            rows.append(
                Row(f"{step}, {name}", None, "s", f"{_USUAL}: {usual:.4g} s", command=command)
            )
            continue
        median = statistics.median(values)
        note = f"peak {peak[name] / 2**30:.2f} GiB"
        rows.append(
            Row(f"{step}, {name}", median, "s", f"{_USUAL}: {usual:.4g} s", usual / median, note=note)
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--batch", type=int, default=64, help="of ResNet-50 at 64 px (default 64: about 2 GiB in each of six processes)"
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10, help="steps of each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        answer_steps(Step(**json.loads(arguments.worker)))
        return 0
    if min(arguments.batch, arguments.repeats) < 1:
        parser.error("--batch and --repeats must be at least 1")
    table = Table(json=arguments.json)
    try:
        table.add(measure(Step("resnet50", arguments.batch, 64, 3, arguments.precision), arguments.repeats))  # fmt: skip
        table.add(measure(Step("lenet_plus_plus", 32, 28, 1, arguments.precision), 10 * arguments.repeats))  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
