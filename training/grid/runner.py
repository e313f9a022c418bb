"""The loop over the grid's cells: each trained, evaluated and recorded, whatever becomes of the others."""

from __future__ import annotations

import itertools
import json
import logging
import math
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training import provenance
from training.choices import GRID_RUNS, RESULTS
from training.data import MissingClasses
from training.engine import TrainingDiverged
from training.grid.cell_evaluation import evaluate_cell
from training.grid.plan import Cell, data_columns
from training.grid.rows import (
    CELL_FILE,
    Row,
    cell_columns,
    cell_key,
    is_recorded,
    merge_rows,
    read_rows,
    replaced_scores,
    require_same_data,
    results_file,
    stored_rows,
)
from training.run_folder import RunInUse, claimed_run
from training.runs import Run, TrainConfig, write_atomically
from training.stacked import can_share, train_stack
from training.train import train

logger = logging.getLogger(__name__)

_STACK = 8


@dataclass
class Outcome:
    """What became of the cells, by name."""

    trained: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def reproduce(
    cells: Sequence[Cell],
    *,
    data: Path | None,
    runs: Path = GRID_RUNS,
    results: Path = RESULTS,
    device: str = "auto",
    workers: int = 0,
    again: bool = False,
    budget_minutes: float | None = None,
    stack: int | None = None,
    processes: int = 1,
    graphs: bool = True,
    show_progress: bool = True,
) -> Outcome:
    """Work through the cells, in order; finished ones are taken as they are, half-trained ones are continued.

    Several processes may do so at once with the same folders: each leaves alone what another one works on.

    Args:
        cells: from ``training.grid.plan``.
        data: root of the data set.
        runs: where the runs lie.
        results: where the rows are gathered.
        device: "auto" takes CUDA where there is one.
        workers: data loading processes.
        again: evaluate (and where need be train) also what already has its rows, but not what this very commit evaluated
            on such a device and in these runs: the same call then goes on where it stopped. Where there is no
            ``exact_commit`` it begins at the first cell.
        budget_minutes: stop after this time; what was trained is kept.
        stack: train up to so many cells side by side where ``training.stacked`` can; 1 trains each alone. None: 8 with
            CUDA, else 1.
        processes: that do this at once; none takes more cells together than leaves some to the others.
        graphs: replay the steps of stacked cells as CUDA graphs.
        show_progress: draw bars.
    """
    outcome = Outcome(left=[cell.name for cell in cells])
    if not cells:
        return outcome
    if stack is not None and stack < 1:
        raise ValueError(f"stack must be at least 1, got {stack}")
    file = results_file(cells[0].protocol, results)
    configs = {cell.name: cell.config(data=data, device=device, workers=workers) for cell in cells}
    first = configs[cells[0].name]
    if stack is None:
        stack = _STACK if first.device.startswith("cuda") else 1
    # The data are the same for all cells but for the digits, which change no class.
    of_data = data_columns(first)
    columns = {cell.name: cell_columns(cell, of_data) for cell in cells}
    places = {
        cell.name: f"cell {number} of {len(cells)}, {cell.name}"
        for number, cell in enumerate(cells, 1)
    }

    code = {"commit": provenance.exact_commit(), "device": provenance.device_name(first.device)}

    def found(name: str, recorded: list[Row]) -> bool:
        """Whether a cell has its rows; those of a finished run are taken over. ``again`` asks for rows of this code.

        Raises:
            ValueError: it has, of other data.
        """
        if not again and is_recorded(columns[name], recorded):
            require_same_data(columns[name], recorded)
            return True
        stored = stored_rows(runs / name)
        if not is_recorded(columns[name], stored):
            return False
        if again and not _is_of(stored, code, runs / name):
            return False
        require_same_data(columns[name], stored)
        merge_rows(file, stored)
        return True

    def work(group: list[str], together: int) -> None:
        """Train and evaluate claimed cells, side by side where more than one may be together."""
        for member in group:
            logger.info("%s: training", places[member])
        diverged: dict[str, Exception] | None = None
        if together > 1:
            diverged = train_stack(
                [configs[member] for member in group],
                runs=runs,
                graphs=graphs,
                show_progress=show_progress,
            )
        for member in group:
            outcome.left.remove(member)
            try:
                run = _finish(configs[member], columns[member], runs, show_progress, diverged)
            except (OSError, MissingClasses, KeyboardInterrupt):
                outcome.left.insert(0, member)
                raise  # of the machine or the data: the next cell would meet the same
            except Exception:  # of this cell alone: it is named, counted and makes the exit code 1
                logger.exception("%s: failed; the others go on", places[member])
                outcome.failed.append(member)
                continue
            rows = stored_rows(run.folder)
            merge_rows(file, rows)
            broken = any("diverged" in row for row in rows)
            (outcome.diverged if broken else outcome.trained).append(member)
            logger.info("%s: %s", places[member], _summary(rows))

    elsewhere: list[str] = []
    kept_claims = ExitStack()
    budget = _Budget(budget_minutes)
    try:
        with budget, kept_claims:
            while outcome.left:
                name = outcome.left[0]
                if found(name, read_rows(file)):
                    outcome.found.append(outcome.left.pop(0))
                    continue
                with ExitStack() as claims:
                    if not _claim(runs / name, claims):
                        elsewhere.append(outcome.left.pop(0))
                        continue
                    # Only now is it certain that no other process has finished it meanwhile.
                    recorded = read_rows(file)
                    if found(name, recorded):
                        outcome.found.append(outcome.left.pop(0))
                        continue
                    together = stack if can_share(configs[name]) else 1
                    if together > 1 and processes > 1:
                        unfinished = sum(not found(one, recorded) for one in outcome.left)
                        together = min(together, math.ceil(unfinished / processes))
                    alike = (
                        other
                        for other in outcome.left[1:]
                        if can_share(configs[name], configs[other])
                        and not found(other, recorded)
                        and _claim(runs / other, claims)
                    )
                    failed = len(outcome.failed)
                    work([name, *itertools.islice(alike, together - 1)], together)
                    if len(outcome.failed) > failed:
                        # Not for another process to fail with again.
                        kept_claims.push(claims.pop_all())
    except KeyboardInterrupt:
        if not budget.is_spent:
            raise
        logger.info("the budget of %g minutes is spent", budget_minutes)
    recorded = read_rows(file)
    for name in elsewhere:
        (outcome.found if found(name, recorded) else outcome.left).append(name)
    return outcome


def update(
    outcome: Outcome, cells: Sequence[Cell], *, data: Path | None, results: Path, device: str
) -> None:
    """Take into an outcome what other processes have done: what has rows now is no longer left."""
    of_data = data_columns(cells[0].config(data=data, device=device))
    rows = read_rows(results_file(cells[0].protocol, results))
    columns = {cell.name: cell_columns(cell, of_data) for cell in cells}
    broken = {cell_key(row) for row in rows if "diverged" in row}
    for name in list(outcome.left):
        if is_recorded(columns[name], rows):
            outcome.left.remove(name)
            diverged = cell_key(columns[name]) in broken
            (outcome.diverged if diverged else outcome.found).append(name)


def _is_of(rows: list[Row], code: Row, folder: Path) -> bool:
    """Whether the rows of a finished run are of this commit and device, and of the scores that lie in its folder."""
    if code["commit"] is None or any(row[name] != code[name] for row in rows for name in code):
        return False
    return not replaced_scores(folder)


def _claim(folder: Path, claims: ExitStack) -> bool:
    """Whether the cell is now this process' own, until the claims end; False where another process works on it."""
    try:
        claims.enter_context(claimed_run(folder))
    except RunInUse:
        return False
    return True


def _finish(
    config: TrainConfig,
    columns: Row,
    runs: Path,
    show_progress: bool,
    diverged: dict[str, Exception] | None,
) -> Run:
    """Train and evaluate one cell and write its ``cell.json`` last: where it is, the cell is finished.

    ``diverged`` is what became of a stack, by name; None where the cell is still to be trained, alone.
    """
    folder = runs / config.name
    record: dict[str, Any] = {"columns": columns}
    try:
        if diverged is None:
            run = train(config, runs=runs, show_progress=show_progress)
        elif config.name in diverged:
            raise diverged[config.name]
        else:
            run = Run(folder)
        record |= evaluate_cell(run, config.device, show_progress)
    except TrainingDiverged as error:
        logger.error("%s", error)
        run = Run(folder)
        record["diverged"] = f"diverged: {str(error).partition(';')[0]}"
    record["provenance"] = {
        "run": config.name,
        "commit": provenance.current_commit(),
        "device": provenance.device_name(config.device),
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(folder / CELL_FILE, json.dumps(record, indent=2) + "\n")
    return run


def _summary(rows: list[Row]) -> str:
    for row in rows:
        if "diverged" in row:
            return str(row["diverged"])
        if (row["group"], row["score"]) == ("unknowns", "softmax"):
            figures = {target: cell["value"] for target, cell in row["ccr_at_fpr"].items()}
            shown = [
                f"CCR@{target} {'-' if figures[target] is None else format(figures[target], '.4f')}"
                for target in ("0.001", "0.01", "0.1")
            ]
            return f"{', '.join(shown)}, accuracy {row['accuracy']['value']:.4f}"
    return "no unknowns in the test part"


class _Budget:
    """Interrupts the process, as Ctrl-C does, when the time is over; entered, it watches.

    Attributes:
        is_spent: whether that happened.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.is_spent = minutes, False
        self._former: Any = None

    def __enter__(self) -> _Budget:
        if self.minutes is not None:
            self._former = signal.signal(signal.SIGALRM, self._stop)
            # Again every minute: an exception that a destructor swallows must not cost the whole budget.
            signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes, 60)
        return self

    def __exit__(self, *_: object) -> None:
        if self.minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._former)

    def _stop(self, *_: object) -> None:
        self.is_spent = True
        # The training loop decides how it is interrupted: it keeps its place.
        signal.raise_signal(signal.SIGINT)
