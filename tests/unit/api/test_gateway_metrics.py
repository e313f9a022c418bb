"""Metrics of several gateway processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run_with_shared_metrics(program: str, folder: Path) -> str:
    """Output of a process of its own: the client library looks at the folder when it is imported."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", f"import os\nfrom api.metrics import Metrics\n{program}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_requests_of_a_process_that_was_killed_are_not_in_flight_for_ever(tmp_path: Path) -> None:
    killed = (
        "metrics = Metrics(); metrics.in_flight.inc(5); metrics.calibrations.inc(); os._exit(9)"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    program = f"import os\nfrom api.metrics import Metrics\n{killed}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=False)
    said = run_with_shared_metrics(
        "metrics = Metrics(); metrics.in_flight.inc(2); print(metrics.render().decode())", tmp_path
    )
    assert "openset_in_flight 2.0" in said
    assert "openset_calibrations_total 1.0" in said  # what it counted stays
