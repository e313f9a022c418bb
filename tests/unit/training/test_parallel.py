"""Several processes: the same gradients, weights, history and resume as one, over uneven shares of a batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training.batches import Share
from training.parallel import gather_rows, process_group

ROOT = Path(__file__).parents[3]

# A network without batch norm, of whose statistics each process sees a part. 64 samples in batches of 7: the shares of two
# processes are uneven, in all and in knowns, and the last batch, of one sample, leaves one of them idle.
PROGRAM = """
import dataclasses, os, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
import openset.networks
import training.engine as engine
import training.runs
from training.data import load_protocol
from training.runs import make_config
from training.train import train

class Plain(nn.Module):
    def __init__(self, feature_dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=3), nn.PReLU(), nn.Flatten(), nn.Linear(512, feature_dim, bias=False)
        )
    def forward(self, images):
        return self.layers(images)

torch.set_num_threads(1)
openset.networks.NETWORKS["lenet_plus_plus"] = Plain
engine.LOG_EVERY = 2
runs, loss, name, kill_at = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
initial_weights = sys.argv[5] or None
if os.environ.get("RANK", "0") != "0":  # the others see no run of the first one's
    runs, initial_weights = runs / "of-another-machine", initial_weights and "not-here"
full = load_protocol("glyphs", size="small", cache_dir=runs / "cache")
some = np.random.default_rng(0).permutation(len(full.train))[:64]
few = dataclasses.replace(
    full, train=full.train.subset(some), validation=full.validation.subset(np.arange(301))
)
training.runs.load_protocol = lambda *_, **__: few
step = engine.Trainer._step
def counted(self, *arguments):
    if (self.progress.epoch, self.progress.step) == (1, kill_at):
        raise SystemExit(9)
    return step(self, *arguments)
engine.Trainer._step = counted
options = {"batch_size": 7, "learning_rate": 0.05, "ema_decay": 0.9, "max_gradient_norm": 1.0, "checkpoint_seconds": 0}
options["initial_weights"] = initial_weights
train(make_config("glyphs", loss, epochs=2, options=options, device="cpu", name=name), runs=runs, show_progress=False)
"""


def start(
    processes: int,
    runs: Path,
    loss: str,
    name: str,
    *,
    kill_at: int = -1,
    initial_weights: str = "",
) -> int:
    program = runs / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        sys.executable, *(launcher if processes > 1 else []), str(program), str(runs), loss, name, str(kill_at),
        initial_weights,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=runs, env=environment, capture_output=True, check=False)
    if done.returncode and kill_at < 0:
        raise AssertionError(done.stderr.decode()[-3000:])
    return done.returncode


def largest_difference(runs: Path, left: str, right: str, key: str) -> float:
    states = [torch.load(runs / name / "last.pt", weights_only=True)[key] for name in (left, right)]
    return max(
        float((states[0][name].double() - states[1][name].double()).abs().max())
        for name in states[0]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process and two, for a loss with a margin, both kinds of terms and a mean over knowns."""
    folder = tmp_path_factory.mktemp("runs")
    start(1, folder, "cos_os", "one")
    start(2, folder, "cos_os", "two")
    return folder


def test_two_processes_end_with_the_weights_of_one(runs: Path) -> None:
    assert largest_difference(runs, "one", "two", "model") < 1e-6
    assert largest_difference(runs, "one", "two", "averaged") < 1e-6


def test_they_report_the_same_history(runs: Path) -> None:
    one, two = (json.loads((runs / name / "history.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, abs=1e-5)


def test_one_process_writes(runs: Path) -> None:
    events = [list((runs / name / "tensorboard").iterdir()) for name in ("one", "two")]
    assert [len(files) for files in events] == [1, 1]
    assert not list((runs / "two").glob("*.partial"))


def test_two_processes_resume_together_at_the_last_checkpoint(runs: Path) -> None:
    assert start(2, runs, "cos_os", "broken", kill_at=5) != 0
    progress = torch.load(runs / "broken" / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 4)
    start(2, runs, "cos_os", "broken")
    assert largest_difference(runs, "two", "broken", "model") == 0.0


def test_only_the_first_process_reads_the_run_that_they_start_from(runs: Path) -> None:
    """Also of one that goes on, which the second process cannot see."""
    start(1, runs, "cos_os", "from-one", initial_weights="one")
    assert start(2, runs, "cos_os", "both-from-one", kill_at=5, initial_weights="one") != 0
    start(2, runs, "cos_os", "both-from-one", initial_weights="one")
    for key in ("model", "averaged"):
        assert largest_difference(runs, "from-one", "both-from-one", key) < 1e-6
        assert largest_difference(runs, "one", "both-from-one", key) > 1e-3


def test_shares_are_all_of_a_batch_and_never_empty() -> None:
    chunk = np.arange(10, 17)
    shares = [Share(rank, 3).of(chunk).tolist() for rank in range(3)]
    assert shares == [[10, 13, 16], [11, 14], [12, 15]]
    assert Share(2, 3).of(chunk[:2]).tolist() == [10]


def test_single_process_keeps_its_rows_and_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu") as (share, device):
        rows = torch.ones(3, 2)
        assert gather_rows(rows, 3, share) is rows
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes .* 2 GPUs"), process_group("cuda"):
        pass
