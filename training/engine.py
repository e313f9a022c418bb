"""The training loop: train, validate, keep checkpoints from which a killed run continues exactly."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from openset.labels import is_known, is_negative
from openset.metrics import clopper_pearson
from training import parallel
from training.batches import ALONE, Share, training_loader
from training.checkpoints import BEST, LAST, read_checkpoint, write_checkpoint
from training.composition import with_composed_negatives
from training.data import ProtocolData, Split, on_device, split_validation
from training.fingerprints import IMAGES, compare_validation, fingerprints
from training.interrupt import DeferredInterrupt
from training.losses import LOSSES
from training.losses.margins import LogitMargin
from training.optimization import AveragedWeights, build_optimizer, learning_rate_factor
from training.options import applies, with_data_defaults
from training.precision import fast_convolutions
from training.pretrained import is_weights_file, load_backbone
from training.run_folder import check_folder, locked_run
from training.runs import (
    CONFIG,
    HISTORY,
    PRETRAINING_NOTES,
    Run,
    TrainConfig,
    write_atomically,
)
from training.step import Normalizer, TrainingStep, smallest_batch, uncompiled
from training.validation import validate

logger = logging.getLogger(__name__)

# Options of the data that do not decide which images train and which validate.
_NOT_SPLIT = ("image_size", "on_unreadable", "download")
_OTHER_DATA = (
    "use the former data, remove its folder, or train under another name (make train NAME=)"
)
LOG_EVERY = 50
# From a quarter of the epochs on, and not before the fifth or so many steps, so many epochs in a row without use are a
# collapse. From random weights ResNet-50 may guess for some hundred steps before it learns.
_EARLIEST_COLLAPSE = 5
_EARLIEST_COLLAPSE_STEPS = 1_000
_COLLAPSED_EPOCHS = 3
# A model that is so much above a guess is called collapsed in one validation of twenty at most, however few images judge.
_ABOVE_GUESS = 0.1


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite, or the model tells no classes apart; the last sound checkpoint is kept."""


def useless_accuracy(num_classes: int) -> float:
    """Below this a model of C classes is no better than a guess: 2/C, with fewer than 20 classes 1.2/C."""
    return (2.0 if num_classes >= 20 else 1.2) / num_classes


def is_useless(correct: int, count: int, num_classes: int) -> bool:
    """Whether so many correct of ``count`` images tell that a model is no better than a guess; none or a few never do.

    The accuracy is below ``useless_accuracy``, and the upper end of its one-sided 95 % interval less than 0.1 above a guess.
    """
    if not count or correct / count >= useless_accuracy(num_classes):
        return False
    _, high = clopper_pearson(correct, count, confidence=0.9)  # 5 % on either side
    return high < 1 / num_classes + _ABOVE_GUESS


@dataclass
class Progress:
    """Where a run stands; ``step`` counts batches done within ``epoch`` (from 0)."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    sample_count: int = 0
    best_confidence: float = -math.inf
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One run in memory.

    Args:
        config: what to train.
        data: the protocol's train and validation parts.
        folder: the run's folder; only the first of several processes writes there.
        show_progress: draw a bar.
        device: of this process; None for the configuration's.
        share: of each batch that this process takes.
        calibration: the protocol's validation part, where ``data`` holds only some of it; it must hold no image that trains.

    Raises:
        ValueError: data, initial weights or batch size do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ProtocolData,
        folder: Path,
        *,
        show_progress: bool = True,
        device: torch.device | None = None,
        share: Share = ALONE,
        calibration: Split | None = None,
    ) -> None:
        self.config, self.data, self.folder, self.share = config, data, folder, share
        self.is_writer = share.rank == 0
        calibration = data.validation if calibration is None else calibration
        self.fingerprints = fingerprints(data, calibration)
        self.show_progress = show_progress and self.is_writer
        self.device = device or torch.device(config.device)
        if share.count > config.training.batch_size:
            raise ValueError(
                f"a batch of {config.training.batch_size} cannot be shared by {share.count} processes; "
                "start fewer (GPUS=) or raise batch_size"
            )
        network, head, self.criterion = config.build_model(len(data.class_ids))
        self.model = nn.ModuleDict({"network": network, "head": head}).to(self.device)
        self.interrupt = DeferredInterrupt()
        self.label = ""  # of the log's lines, where several runs write them
        # Told by what is here when training begins; a run that this one starts from may be gone when it is judged.
        self.pretraining_notes: list[str] = []
        if config.initial_weights is not None:
            # The first process alone sees whether the run goes on.
            is_new = parallel.from_writer(not (folder / LAST).is_file(), share)
            if is_new:
                self._take_initial_weights(config.initial_weights, calibration)
        if share.count > 1 and self.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(memory_format=torch.channels_last)
        self.criterion.to(self.device)
        preset = config.training
        self.averaged = AveragedWeights(self.model, preset.ema_decay) if preset.ema_decay else None
        self.uses_negatives = LOSSES[config.loss].uses_negatives
        if self.uses_negatives and not is_negative(data.train.labels).any():
            plain = ", ".join(name for name, spec in LOSSES.items() if not spec.uses_negatives)
            raise ValueError(
                f"loss {config.loss} learns from negatives, and {config.data or 'the data'} holds none; add foreign images "
                f"(protocol folders: in negative/), or take a loss that shows none: {plain}"
            )
        counted = len(data.train) if self.uses_negatives else int(is_known(data.train.labels).sum())
        self.steps_per_epoch = math.ceil(counted / preset.batch_size)
        self.smallest_batch = self._smallest_batch(counted)
        # The schedule goes on with steps that learn; a last batch that is too small is no such step.
        is_last_left_out = 0 < counted % preset.batch_size < self.smallest_batch
        self.optimizer = build_optimizer(self.model, preset)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            learning_rate_factor(preset, config.epochs, self.steps_per_epoch - is_last_left_out),
        )
        step = TrainingStep(
            self.model,
            self.criterion,
            Normalizer(data.preprocessing, self.device),
            precision=preset.precision,
            compiled=config.compiled,
            share=share,
        )
        self.loss_of = parallel.wrapped(step, self.device, share)
        self.progress = Progress()
        # Epochs compete on this half alone, so that the other half can still certify the winner.
        halves = split_validation(calibration.groups, verify_share=0.0, best=True)
        parts = halves.within(data.validation.sample_ids, calibration.sample_ids)
        # What no foreign image trains, none may choose an epoch of.
        own = [
            with_composed_negatives(
                part, preset.composed_negatives, config.seed, turn=not preset.turned_negatives
            )
            for part in (data.train, data.validation.subset(parts.selection))
        ]
        self.training_part, self.validation = on_device(own, self.device)

    def _smallest_batch(self, counted: int) -> int:
        size, batch_size = self.data.preprocessing.image_size, self.config.training.batch_size
        least = smallest_batch(self.config.network, size, self.share, self.device)
        if min(counted, batch_size) < least:
            raise ValueError(
                f"at image_size={size} ResNet-50 ends in maps of one pixel, and its batch norm needs a batch of {least} images "
                f"or more; got batch_size={batch_size} and {counted} training images. Raise batch_size, add images or take a "
                "larger image_size"
            )
        return least

    def _take_initial_weights(self, source: str, calibration: Split) -> None:
        if not is_weights_file(source):
            self._start_from(source, calibration)
            return
        if self.config.network != "resnet50":
            raise ValueError(
                f"initial_weights={source} is for ResNet-50, protocol {self.config.protocol} trains {self.config.network}"
            )
        load_backbone(self.model["network"], Path(source))
        self.pretraining_notes = self.config.pretraining_notes
        if not self.config.training.normalize_images and self.is_writer:
            logger.warning(
                "%s: torchvision's weights were trained on images with mean and standard deviation taken out; "
                "add OPTIONS=normalize_images=true, or take PRESET=modern, which does so", source,
            )  # fmt: skip

    def _start_from(self, folder: str, calibration: Split) -> None:
        """Take over the weights of a run on the same data, classes and shapes; nothing else of it.

        Other data are refused: what that run trained on may be what this one validates and calibrates with. Several
        processes all get what the first one reads.
        """
        source = None
        if self.is_writer:
            run = Run(folder)
            source = run.config, run.load_checkpoint(), run.pretraining_notes()
            del source[1]["optimizer"]  # as large as the weights, and stays behind
        config, state, self.pretraining_notes = parallel.from_writer(source, self.share)
        what = f"initial_weights={folder}"
        now, then = (
            {
                key: value
                for key, value in with_data_defaults(one.protocol, one.data_options).items()
                if key not in _NOT_SPLIT
            }
            | {"protocol": one.protocol}
            for one in (self.config, config)
        )
        if now != then:
            raise ValueError(
                f"{what} was trained on {then}, this run on {now}; images that it trained on could "
                "calibrate this one, so both need the same protocol, split and source of images"
            )
        if state["class_ids"] != list(self.data.class_ids):
            raise ValueError(
                f"{what} was trained on other classes ({len(state['class_ids'])}) than the data "
                f"hold ({len(self.data.class_ids)})"
            )
        # One tree's paths tell which images are the same; those of two trees do not.
        is_other_tree = _resolved(config.data) != _resolved(self.config.data)
        data = replace(self.data, validation=calibration)
        compare_validation(
            state, data, what=what, root=self.config.data, is_other_tree=is_other_tree
        )
        try:
            self.model.load_state_dict(state["averaged"] or state["model"])
        except RuntimeError as error:
            raise ValueError(
                f"{what} holds another network or head than this run: {error}"
            ) from error

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything needed to continue: weights, optimizer, schedule, position, history, random state."""
        head = self.model["head"]
        return {
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.module.state_dict(),
            "averaged_count": 0 if self.averaged is None else self.averaged.count,
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": vars(self.progress),
            "random": torch.get_rng_state(),
            "num_classes": len(self.data.class_ids),
            "class_ids": list(self.data.class_ids),
            **self.fingerprints,
            PRETRAINING_NOTES: self.pretraining_notes,
            "head_scale": getattr(head, "scale", None),
        }

    def save(self, name: str = LAST) -> None:
        """Write a checkpoint atomically; neither a kill nor a power cut leaves half a file.

        Raises:
            TrainingDiverged: a weight is not finite; the file stays as it was.
            OSError: the disk is full or gone; the file stays as it was.
        """
        if not self.is_writer:
            return
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise self._diverged("the weights hold a value that is not finite")
        target = self.folder / name
        try:
            write_checkpoint(target, self.state())
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot write {target} ({error}); earlier checkpoints are intact, free space and rerun"
            ) from error

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While entered no other process trains in the run's folder; a run that lies there is continued.

        Raises:
            RunInUse: one does.
            ValueError: the folder holds another run, or a checkpoint that does not fit.
        """
        with locked_run(self.folder) if self.is_writer else nullcontext():
            if self.is_writer:
                check_folder(self.folder, self.config)
            if self.resume():
                logger.info(
                    "continuing %s at epoch %d, step %d",
                    self.folder, self.progress.epoch + 1, self.progress.step,
                )  # fmt: skip
            if self.is_writer:
                # Also of a run that was begun before: epochs, scores and where the data lie may have changed.
                write_atomically(self.folder / CONFIG, self.config.to_json())
            yield

    def resume(self) -> bool:
        """Continue from ``last.pt`` if it is there; True if so. Several processes all get the first one's state.

        Raises:
            ValueError: the checkpoint is damaged, or of other classes or images.
        """
        file = self.folder / LAST
        state = read_checkpoint(file) if self.is_writer and file.is_file() else None
        if state is not None and PRETRAINING_NOTES not in state:  # of an earlier release
            state[PRETRAINING_NOTES] = self.config.pretraining_notes
        state = parallel.from_writer(state, self.share)
        if state is None:
            return False
        if state["class_ids"] != list(self.data.class_ids):
            raise ValueError(
                f"{file} was trained on {len(state['class_ids'])} other classes than the data now hold "
                f"({len(self.data.class_ids)}); {_OTHER_DATA}"
            )
        # Checkpoints of earlier releases do not know their data.
        if state.get(IMAGES, self.fingerprints[IMAGES]) != self.fingerprints[IMAGES]:
            raise ValueError(
                f"{file} was trained or validated on other images than {self.config.data or 'the data'} now holds; {_OTHER_DATA}"
            )
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(state["averaged"])
            self.averaged.count = state["averaged_count"]
        self.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])
        self.pretraining_notes = state[PRETRAINING_NOTES]
        torch.set_rng_state(state["random"])
        return True

    # -- training ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the last epoch and return the last row of the history.

        Ctrl-C is honoured between two steps: the checkpoint then holds all of the last step and nothing of the next. After the
        last step the epoch is finished first.

        Raises:
            TrainingDiverged: the loss, a weight or a validation figure is not finite, or the accuracy stays that of a
                guess late in training.
            KeyboardInterrupt: after the checkpoint was written.
        """
        config = self.config
        folder = self.folder / "tensorboard" if self.is_writer else None
        with (
            self.interrupt,
            summary_writer(folder, self.progress.epoch * self.steps_per_epoch) as writer,
            fast_convolutions(self.device),
        ):
            while self.progress.epoch < config.epochs:
                self._train_epoch(writer)
                row = self._validate()
                self._finish_epoch(row, writer)
        # The steps look at it; nothing else would tell of one that came in the last validation.
        if parallel.is_set_anywhere(self.interrupt.requested, self.device, self.share):
            raise KeyboardInterrupt
        return self.progress.history[-1] if self.progress.history else {}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        return iter(
            training_loader(
                self.training_part,
                preprocessing=self.data.preprocessing,
                augmentation=config.training.augmentation,
                batch_size=config.training.batch_size,
                seed=config.seed,
                epoch=self.progress.epoch,
                workers=config.workers,
                include_negatives=self.uses_negatives,
                skip_batches=self.progress.step,
                device=self.device,
                share=self.share,
                turned_negatives=config.training.turned_negatives,
            )
        )

    def _train_epoch(self, writer: SummaryWriter | None) -> None:
        progress = self.progress
        loss_sum = self._start_epoch()
        saved_at = time.monotonic()
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch + 1}/{self.config.epochs}",
            disable=not self.show_progress,
            mininterval=1.0,
        )
        with bar:
            for images, labels in self._batches():
                if len(labels) >= self.smallest_batch:
                    loss = self._step(images, labels)
                    loss_sum += loss.detach().double() * len(labels)
                    progress.sample_count += len(labels)
                # Also of what was too small, or could not be read: a resumed run skips so many batches.
                progress.step += 1
                bar.update()
                must_stop = self.interrupt.requested and self.share.count == 1
                if (
                    must_stop
                    or progress.step % LOG_EVERY == 0
                    or progress.step == self.steps_per_epoch
                ):
                    mean = self._read_loss(loss_sum, writer)
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    if self.share.count > 1:
                        must_stop = parallel.is_set_anywhere(
                            self.interrupt.requested, self.device, self.share
                        )
                    is_due = time.monotonic() - saved_at > self.config.checkpoint_seconds
                    if must_stop or is_due:
                        self.save()
                        saved_at = time.monotonic()
                    if must_stop:
                        raise KeyboardInterrupt
        progress.loss_sum = float(loss_sum)
        self._check_finite(progress.loss_sum)

    def _start_epoch(self) -> Tensor:
        """Make ready for steps of the present epoch; the sum of its losses so far, on the device."""
        self.model.train()
        self.criterion.train()
        if hasattr(self.criterion, "set_epoch"):
            self.criterion.set_epoch(self.progress.epoch)
        return torch.full((), self.progress.loss_sum, dtype=torch.float64, device=self.device)

    def _read_loss(self, loss_sum: Tensor, writer: SummaryWriter | None) -> float:
        """The mean loss so far; the only synchronisation with the device."""
        progress = self.progress
        progress.loss_sum = float(loss_sum)
        self._check_finite(progress.loss_sum)
        mean = progress.loss_sum / max(progress.sample_count, 1)
        if writer is not None:
            step = progress.epoch * self.steps_per_epoch + progress.step
            writer.add_scalar("train/loss", mean, step)
        return mean

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = self._update(images, labels)
        self.schedule.step()
        if self.averaged is not None:
            self.averaged.update()
        return loss

    def _update(self, images: Tensor, labels: Tensor) -> Tensor:
        """The step's work on the device alone: it could be recorded and replayed."""
        preset = self.config.training
        with uncompiled(self.config.compiled and len(labels) < preset.batch_size):
            loss: Tensor = self.loss_of(images.to(self.device, non_blocking=True), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if preset.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), preset.max_gradient_norm)
        self.optimizer.step()
        return loss

    def _check_finite(self, loss_sum: float) -> None:
        if not math.isfinite(loss_sum):
            raise self._diverged(f"the loss is {loss_sum}")

    def _check_collapse(self, accuracy: float) -> None:
        """Finite losses can hide a model that has unlearnt its classes (the published arc_os on p1 did)."""
        done = self.progress.epoch + 1
        if done < max(_EARLIEST_COLLAPSE, math.ceil(self.config.epochs / 4)):
            return
        if done * self.steps_per_epoch < _EARLIEST_COLLAPSE_STEPS:
            return
        num_classes = len(self.data.class_ids)
        former = [row["validation_accuracy"] for row in self.progress.history]
        latest = [*former, accuracy][-_COLLAPSED_EPOCHS:]
        count = int(is_known(self.validation.labels).sum())
        if len(latest) == _COLLAPSED_EPOCHS and is_useless(
            round(max(latest) * count), count, num_classes
        ):
            limit = useless_accuracy(num_classes)
            raise self._diverged(
                f"the model has collapsed, its validation accuracy is {accuracy:.4f} and was below {limit:.4f}, hardly more "
                f"than a guess, for {_COLLAPSED_EPOCHS} epochs"
            )

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{self.config.loss}: {what} in epoch {self.progress.epoch + 1}, at or before step {self.progress.step}; "
            f"the last sound checkpoint is {self.folder / LAST}. Try {' or '.join(self._ways_out())} (OPTIONS=...)"
        )

    def _ways_out(self) -> list[str]:
        """Options against a divergence that this run's loss takes and the run does not have yet."""
        spec, loss = self.criterion.spec, self.config.loss
        ways = ["a smaller learning_rate"]
        if self.config.training.max_gradient_norm is None:
            ways.append("max_gradient_norm=5")
        if applies("margin_warmup_epochs", loss) and not self.criterion.margin_warmup_epochs:
            ways.append("margin_warmup_epochs=5")
        # A constant radius, and a margin on the logit itself, have no radial path.
        is_radial = spec.head != "hard" and not isinstance(spec.margin, LogitMargin)
        if applies("detach_radial", loss) and is_radial and not self.criterion.detach_radial:
            ways.append("detach_radial=true")
        return ways

    def _finish_epoch(self, row: dict[str, Any], writer: SummaryWriter | None) -> None:
        progress = self.progress
        for name, value in row.items():
            if not math.isfinite(value):
                raise self._diverged(f"{name} is {value}")
        self._check_collapse(row["validation_accuracy"])
        row = {
            "epoch": progress.epoch + 1,
            "train_loss": progress.loss_sum / max(progress.sample_count, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **row,
        }
        progress.history.append(row)
        progress.epoch += 1
        progress.step, progress.loss_sum, progress.sample_count = 0, 0.0, 0
        is_best = row["confidence"] > progress.best_confidence
        progress.best_confidence = max(progress.best_confidence, row["confidence"])
        if writer is None:
            return
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(f"epoch/{name}", value, row["epoch"])
        # The last one last: it says that the epoch is over, and with it that all of this was done.
        if is_best:
            self.save(BEST)
        write_atomically(self.folder / HISTORY, json.dumps(progress.history, indent=2) + "\n")
        self.save()
        logger.info(
            "%sepoch %d/%d: train loss %.4f, margin-free validation loss %.4f, accuracy %.4f, confidence %.4f%s",
            self.label, row["epoch"], self.config.epochs, row["train_loss"], row["validation_loss_without_margin"],
            row["validation_accuracy"], row["confidence"], " (best)" if is_best else "",
        )  # fmt: skip

    def _validate(self) -> dict[str, float]:
        model = self.model if self.averaged is None else self.averaged.module
        parallel.same_buffers(model, self.share)
        with uncompiled(self.config.compiled):
            return validate(
                model,
                self.validation,
                self.data.preprocessing,
                self.device,
                self.config,
                self.share,
            )


def _resolved(root: str | None) -> Path | None:
    return None if root is None else Path(root).resolve()


@contextmanager
def summary_writer(folder: Path | None, purge_step: int) -> Iterator[SummaryWriter | None]:
    """TensorBoard's files; what they hold from ``purge_step`` on is done again. None for processes that do not write."""
    if folder is None:
        yield None
        return
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    try:
        yield writer
    finally:
        writer.close()
