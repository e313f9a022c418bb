"""Who starts a stack takes it along, also by kill -9. The stack is a script that says it is ready and sleeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
DEMO = "from serving import demo; demo.sys.executable = {stack!r}; demo.start_stack(1, keep={keep}); demo.time.sleep(600)"
BENCHMARK = """
import asyncio, sys
from pathlib import Path
from benchmarks.serving import processes
processes.sys.executable = {stack!r}
async def main():
    async with processes.served_by_stack(Path('.'), 'x', [], {{}}):
        print('up', flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def stacks(script: Path) -> list[psutil.Process]:
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(script.with_suffix(".pid")) in (p.info["cmdline"] or [])
    ]


def the_stack(script: Path) -> psutil.Process:
    """The one stack; it says that it is ready a moment before its command line can be known by the mark."""
    end = time.monotonic() + 10
    while not (found := stacks(script)) and time.monotonic() < end:
        time.sleep(0.05)
    (stack,) = found
    return stack


def fake_stack(folder: Path) -> Path:
    script = folder / "stack"
    mark = script.with_suffix(".pid")
    script.write_text(f'#!/bin/sh\necho "ready: x"\nexec tail -f /dev/null {mark}\n')
    script.chmod(0o755)
    mark.touch()
    return script


@pytest.mark.parametrize(
    ("program", "keep", "left"), [(DEMO, False, 0), (DEMO, True, 1), (BENCHMARK, False, 0)]
)
def test_killed_starter_leaves_no_stack_unless_it_was_to_be_kept(
    tmp_path: Path, program: str, keep: bool, left: int
) -> None:
    script = fake_stack(tmp_path)
    command = [sys.executable, "-c", program.format(stack=str(script), keep=keep)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    starter = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    said = b""
    while b"up" not in said and b"ready after" not in said:
        said = starter.stdout.readline()
        assert said, "the starter ended"
    stack = the_stack(script)
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    if left:
        time.sleep(0.5)
        assert stack.is_running()
        stack.kill()
    else:
        psutil.wait_procs([stack], timeout=60)
        assert not stacks(script)
