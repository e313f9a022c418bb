"""Which code on which hardware made a figure."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def current_commit() -> str | None:
    """The working copy's commit, with "+" where tracked files are changed; None outside of one."""
    root = Path(__file__).parents[1]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def exact_commit() -> str | None:
    """The working copy's commit where it says which code runs; None where tracked files are changed, or outside of one."""
    commit = current_commit()
    return None if commit is None or commit.endswith("+") else commit


def device_name(device: str) -> str:
    """The hardware, for people."""
    if device.startswith("cuda"):
        import torch  # takes seconds, and who asks for a processor has no need of it

        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} core{'s' * (cores > 1)}"
