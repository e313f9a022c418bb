"""kill -9 of a training process at random moments: whatever the moment, the same command ends with the same weights.

    python -m benchmarks.train_chaos [--kills 50] [--seed 0] [--json FILE]

Each round trains ``glyphs`` (40 images a class, two epochs) in a process that is killed after a random share of the time an
undisturbed run takes, is started again, and must end with the very same weights, averaged weights, best epoch and history.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import training.engine as engine
from benchmarks.training.rows import machine
from training.checkpoints import BEST, LAST
from training.data import ProtocolData, at_most
from training.runs import HISTORY, Run, TrainConfig, make_config
from training.train import train

# Imported once by a server that every training process is forked from: a start then costs no import of torch.
_CONTEXT = multiprocessing.get_context("forkserver")
_PER_CLASS = 40
_PRELOADED = ["training.train", "training.glyphs", "training.imagenet"]


@dataclasses.dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills: processes killed while they trained.
        resumed: of those, how many had left a checkpoint to go on from.
        different: rounds that did not end like the undisturbed run.
    """

    kills: int = 0
    resumed: int = 0
    different: list[str] = dataclasses.field(default_factory=list)


def _train(runs: Path, name: str, per_class: int) -> None:
    """One training process; checkpoints at every fourth step."""
    torch.set_num_threads(1)
    engine.LOG_EVERY = 4
    config = _config(name)
    train(config, runs=runs, show_progress=False, data=_data(config, per_class))


def _config(name: str) -> TrainConfig:
    options = {"size": "small", "batch_size": 64, "precision": "float32", "checkpoint_seconds": 0}
    return make_config(
        "glyphs", "arc_os", preset="modern", epochs=2, options=options, device="cpu", name=name
    )


def _data(config: TrainConfig, per_class: int) -> ProtocolData:
    """Few images: what is tested are the moments between steps, not what is learned."""
    data = config.load_data(("train", "validation"))
    return dataclasses.replace(
        data,
        train=at_most(data.train, per_class),
        validation=at_most(data.validation, per_class),
    )


def _load() -> None:
    _config("warm-up").load_data(("train", "validation"))


def _start(runs: Path, name: str, per_class: int) -> Any:
    process = _CONTEXT.Process(target=_train, args=(runs, name, per_class), name=name)
    process.start()
    return process


def _finish(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{process.name} ended with {process.exitcode}, expected 0")


def _result(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on what happened on the way."""
    states = {name: torch.load(run / name, weights_only=True) for name in (LAST, BEST)}
    return {
        "history": json.loads((run / HISTORY).read_text()),
        **{
            f"{file}/{part}/{name}": value
            for file, state in states.items()
            for part in ("model", "averaged")
            for name, value in state[part].items()
        },
    }


def _is_same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        for name, value in left.items()
    )


def survive(
    kills: int,
    *,
    seed: int,
    runs: Path,
    per_class: int = _PER_CLASS,
    show_progress: bool = True,
) -> Outcome:
    """Kill that many training processes, on so many images a class, and compare each round's end with an undisturbed run."""
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    # Renders the glyphs and starts the server; what an undisturbed run takes is timed without that.
    warm_up = _CONTEXT.Process(target=_load, name="warm-up")
    warm_up.start()
    _finish(warm_up)
    started = time.monotonic()
    _finish(_start(runs, "undisturbed", per_class))
    seconds = time.monotonic() - started
    expected = _result(runs / "undisturbed")
    moments, outcome, number = random.Random(seed), Outcome(), 0
    with tqdm(total=kills, desc="kills", disable=not show_progress) as bar:
        while outcome.kills < kills:
            name, number = f"round-{number}", number + 1
            process = _start(runs, name, per_class)
            process.join(moments.random() * seconds)
            if process.exitcode is not None:
                continue  # it was faster than the moment
            process.kill()
            process.join()
            outcome.kills += 1
            if (runs / name / LAST).is_file():
                Run(runs / name).load_checkpoint()  # whole, whatever the moment
                outcome.resumed += 1
            _finish(_start(runs, name, per_class))
            if not _is_same(_result(runs / name), expected):
                outcome.different.append(name)
            bar.update()
    return outcome


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every round ended alike."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        outcome = survive(arguments.kills, seed=arguments.seed, runs=Path(folder))
    row = {
        "name": f"training killed at {outcome.kills} random moments, seed {arguments.seed}",
        "value": len(outcome.different),
        "unit": "runs that ended with other weights",
        "baseline": f"an undisturbed run; {outcome.resumed} of the kills left a checkpoint to go on from",
        "ratio": None,
        "aim": 0,
        "met": not outcome.different,
    }
    print(json.dumps(row, indent=2))
    if arguments.json:
        content = {"machine": machine(), "rows": [row]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0 if row["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
