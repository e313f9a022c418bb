"""Several small models on one device at once, each on a stream of its own that replays its step as a CUDA graph.

A LeNet++ step is a chain of kernels too short and too small to fill a GPU, and started one by one they keep the host busy
and the GPU waiting. Recorded once, a step costs the host one call; the chains of several models then run side by side.

One network with stacked weights would need grouped convolutions and one loss for all. Here a model keeps its own modules,
optimizer and number of steps: what it learns is what it would learn alone, on a CPU bit for bit, and one that diverges
leaves the others alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.augmentation import TurnedNegatives
from training.batches import epoch_order
from training.choices import RUNS
from training.data import ProtocolData, on_device
from training.engine import LOG_EVERY, Trainer, TrainingDiverged, summary_writer
from training.interrupt import DeferredInterrupt
from training.losses.scales import ADACOS_DYNAMIC
from training.precision import fast_convolutions
from training.protocols import get_protocol
from training.run_folder import check_folder
from training.runs import TrainConfig

logger = logging.getLogger(__name__)

# Steps that are taken before one is recorded: they choose kernels and make the optimizer's state.
_WARM_UP = 3


def ask_for_queues(processes: int = 1) -> None:
    """Let 32 streams run apart, not 8; CUDA reads this when it starts in the process, so it must be said before.

    With 32 for each a GPU that processes share under MPS refuses the fourth; several therefore get 4.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32" if processes == 1 else "4")


def can_share(*configs: TrainConfig) -> bool:
    """Whether runs can be trained side by side: on the same characters and device, with steps that the host stays out of.

    A schedule, averaged weights and AdaCos' dynamic scale need the host at every step.
    """
    return len({_shared_part(config) for config in configs}) == 1 and all(
        get_protocol(config.protocol).is_of_characters
        and config.training.schedule == "constant"
        and not config.training.warmup_epochs
        and not config.training.ema_decay
        and config.loss_options.get("scale") != ADACOS_DYNAMIC
        for config in configs
    )


def _shared_part(config: TrainConfig) -> str:
    """The images, and where they lie."""
    options, normalized = config.data_options, config.training.normalize_images
    return json.dumps(
        [config.protocol, config.data, options, normalized, config.device], sort_keys=True
    )


class StackedTrainer(Trainer):
    """A run that is trained a step at a time, beside others.

    Args:
        config: what to train; ``can_share`` holds.
        data: the protocol's train and validation parts.
        folder: the run's folder.
        graphs: replay the step as a CUDA graph; without CUDA it is computed anew each time.
    """

    def __init__(
        self, config: TrainConfig, data: ProtocolData, folder: Path, *, graphs: bool = True
    ) -> None:
        super().__init__(config, data, folder, show_progress=False)
        self.label = f"{config.name}, "
        part, device = self.training_part, self.device
        assert isinstance(part.images, Tensor)
        self.images = part.images
        self.labels = torch.from_numpy(part.labels).to(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._uses_graphs = graphs and self.stream is not None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_margin = 1.0
        self._steps_taken = 0
        # What a recorded step reads and writes keeps its place: the order of the epoch, which batch is next, the losses.
        self._order = torch.from_numpy(self._epoch_order(0)).to(device)
        batch_size = config.training.batch_size
        whole = len(self._order) // batch_size
        self._whole_batches = self._order[: whole * batch_size].view(whole, batch_size)
        self._rest = self._order[whole * batch_size :]
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        share = config.training.turned_negatives
        self._turned = (
            TurnedNegatives(part.labels, seed=config.seed, epoch=0, share=share, device=device)
            if share
            else None
        )

    def on_stream(self) -> AbstractContextManager[Any]:
        """All work of this run must be started within."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    @property
    def steps_left(self) -> int:
        """Of the whole run."""
        epochs = self.config.epochs - self.progress.epoch
        return max(0, epochs * self.steps_per_epoch - self.progress.step)

    def steps(self) -> Generator[None, None, None]:
        """Train to the last epoch, as ``run`` does; yields after each step, which the device may still be working on.

        Raises:
            TrainingDiverged: the loss, a weight or a validation figure is not finite.
        """
        purge_step = self.progress.epoch * self.steps_per_epoch
        with summary_writer(self.folder / "tensorboard", purge_step) as writer:
            while self.progress.epoch < self.config.epochs:
                yield from self.epoch_steps(writer)
                self._finish_epoch(self._validate(), writer)

    def epoch_steps(self, writer: SummaryWriter | None) -> Generator[None, None, None]:
        """The steps that are left of the present epoch."""
        progress = self.progress
        self._start_epoch()
        saved_at = time.monotonic()
        while progress.step < self.steps_per_epoch:
            self._next_step()
            if progress.step % LOG_EVERY == 0 or progress.step == self.steps_per_epoch:
                self._read_loss(self._loss_sum, writer)
                if time.monotonic() - saved_at > self.config.checkpoint_seconds:
                    self.save()
                    saved_at = time.monotonic()
            yield

    def keep(self) -> None:
        """Save where the run stands, between two steps of an epoch."""
        self._read_loss(self._loss_sum, None)
        self.save()

    def _epoch_order(self, epoch: int) -> Any:
        return epoch_order(
            self.training_part,
            seed=self.config.seed,
            epoch=epoch,
            include_negatives=self.uses_negatives,
        )

    def _start_epoch(self) -> Tensor:
        self._loss_sum.copy_(super()._start_epoch())
        self._order.copy_(torch.from_numpy(self._epoch_order(self.progress.epoch)))
        self._position.fill_(self.progress.step)
        if self._turned is not None:
            self._turned.start_epoch(self.progress.epoch)
        if self._graph_margin != self.criterion.margin_factor:
            # The margin is a constant of the recorded step. A compiled one is compiled anew for it, which cannot happen while
            # it is recorded.
            self._graph, self._steps_taken = None, 0
        return self._loss_sum

    def _next_step(self) -> None:
        progress = self.progress
        if progress.step >= len(self._whole_batches):
            self._learn(self._rest)
            progress.sample_count += len(self._rest)
        else:
            if self._graph is None and self._uses_graphs and self._steps_taken >= _WARM_UP:
                self._graph = self._recorded()
            if self._graph is None:
                self._whole_batch()
                self._steps_taken += 1
            else:
                self._graph.replay()
            progress.sample_count += self.config.training.batch_size
        self.schedule.step()
        progress.step += 1

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Nothing is computed here.
            with torch.cuda.graph(graph, stream=self.stream):
                self._whole_batch()
        except RuntimeError as error:
            raise RuntimeError(
                f"the step of {self.config.name} cannot be recorded as a CUDA graph ({error}); "
                "train without graphs (--no-graphs)"
            ) from error
        self._graph_margin = self.criterion.margin_factor
        return graph

    def _whole_batch(self) -> None:
        """A step on the batch that the counter on the device points at, and the counter's own step."""
        self._learn(self._whole_batches.index_select(0, self._position)[0])
        self._position.add_(1)

    def _learn(self, chosen: Tensor) -> None:
        labels = self.labels.index_select(0, chosen)
        images = self.images.index_select(0, chosen)
        if self._turned is not None:
            images = self._turned(images, chosen)
        loss = self._update(images, labels)
        self._loss_sum.add_(loss.detach().double() * len(chosen))


_Running = dict[StackedTrainer, Generator[None, None, None]]


def take_turns(running: _Running) -> Iterator[dict[str, Exception]]:
    """One step of each, again and again, until all have ended; those that end or diverge leave ``running``.

    Yields:
        After each round: who diverged in it, by name.
    """
    while running:
        diverged: dict[str, Exception] = {}
        for trainer, steps in list(running.items()):
            try:
                with trainer.on_stream():
                    next(steps)
            except StopIteration:
                del running[trainer]
            except TrainingDiverged as error:
                del running[trainer]
                diverged[trainer.config.name] = error
        yield diverged


def train_stack(
    configs: Sequence[TrainConfig],
    *,
    runs: Path = RUNS,
    data: ProtocolData | None = None,
    graphs: bool = True,
    show_progress: bool = True,
) -> dict[str, Exception]:
    """Train, or continue, several runs side by side; each gets the folder that ``training.train.train`` would make.

    Args:
        configs: of the runs, with the same images and device (``can_share``).
        runs: where the folders lie.
        data: train and validation parts; None loads the protocol's.
        graphs: replay steps as CUDA graphs where there is CUDA.
        show_progress: draw a bar.

    Returns:
        Why runs diverged, by name; all others are trained to the end.

    Raises:
        ValueError: runs that cannot be trained together, or a folder that holds another run.
        OSError: a run cannot be saved; at an interrupt all others are.
        KeyboardInterrupt: after every run was saved between two steps.
    """
    names = [config.name for config in configs]
    if not can_share(*configs):
        raise ValueError(
            "only runs on the same characters and device, with a constant learning rate, no averaged weights and no "
            f"dynamic scale, are trained side by side; got {', '.join(names) or 'none'}"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"runs need names of their own, got {', '.join(names)}")
    for config in configs:
        check_folder(runs / config.name, config)
    device = torch.device(configs[0].device)
    if data is None:
        data = configs[0].load_data(("train", "validation"))
    for note in data.notes:
        logger.warning("%s", note)
    [training_part] = on_device([data.train], device)
    data = replace(data, train=training_part)  # moved once, for all
    trainers = [
        StackedTrainer(config, data, runs / config.name, graphs=graphs) for config in configs
    ]
    with ExitStack() as folders:
        for trainer in trainers:
            folders.enter_context(trainer.opened())
        return _train_together(trainers, device, show_progress)


def _train_together(
    trainers: list[StackedTrainer], device: torch.device, show_progress: bool
) -> dict[str, Exception]:
    diverged: dict[str, Exception] = {}
    running = {trainer: trainer.steps() for trainer in trainers}
    total = sum(trainer.steps_left for trainer in trainers)
    bar = tqdm(
        total=total, desc=f"{len(trainers)} runs", disable=not show_progress, mininterval=1.0
    )
    _wait_for(device)  # what the default stream still does must be seen by the others
    interrupt = DeferredInterrupt()
    try:
        with bar, interrupt, fast_convolutions(device):
            for broken in take_turns(running):
                for error in broken.values():
                    logger.error("%s", error)
                diverged |= broken
                bar.update(len(running))
                if interrupt.requested:
                    _keep_all(running)
                    raise KeyboardInterrupt
    finally:
        for steps in running.values():
            steps.close()
        _wait_for(device)  # before anything that the streams still use is given back
    return diverged


def _keep_all(running: _Running) -> None:
    """Save every run.

    Raises:
        OSError: some cannot be saved; all others are.
    """
    failed: list[str] = []
    for trainer in running:
        try:
            with trainer.on_stream():
                trainer.keep()
        except TrainingDiverged as error:
            logger.error(
                "%s", error
            )  # it goes on from its last sound checkpoint, and diverges again
        except OSError as error:
            failed.append(str(error))
    if failed:
        raise OSError("; ".join(failed))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
