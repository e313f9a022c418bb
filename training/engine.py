"""The training loop: train, validate, keep checkpoints from which a killed run continues exactly."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from openset.labels import is_known, is_negative
from openset.preprocessing import Preprocessing
from openset.scores import all_logits
from training.data import ImageFiles, ProtocolData, Split, split_validation, training_loader
from training.interrupt import DeferredInterrupt
from training.losses import LOSSES
from training.runs import (
    BEST,
    CONFIG,
    HISTORY,
    LAST,
    Preset,
    Run,
    TrainConfig,
    write_atomically,
)

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 120.0

# Options of the data that do not decide which images train and which validate.
_NOT_SPLIT = ("image_size", "on_unreadable", "download")
LOG_EVERY = 50


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the last sound checkpoint is kept."""


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
        folder: the run's folder.
        show_progress: draw a bar.
    """

    def __init__(
        self, config: TrainConfig, data: ProtocolData, folder: Path, *, show_progress: bool = True
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.show_progress = show_progress
        self.device = torch.device(config.device)
        network, head, self.criterion = config.build_model(len(data.class_ids))
        self.model = nn.ModuleDict({"network": network, "head": head}).to(self.device)
        self.interrupt = DeferredInterrupt()
        if config.initial_weights is not None and not (folder / LAST).is_file():
            self._start_from(Run(config.initial_weights))
        self.model.to(memory_format=torch.channels_last)
        self.criterion.to(self.device)
        preset = config.training
        self.averaged = (
            AveragedModel(
                self.model, multi_avg_fn=_ramped_average(preset.ema_decay), use_buffers=True
            )
            if preset.ema_decay
            else None
        )
        self.uses_negatives = LOSSES[config.loss].uses_negatives
        counted = len(data.train) if self.uses_negatives else int(is_known(data.train.labels).sum())
        self.steps_per_epoch = math.ceil(counted / preset.batch_size)
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self.model, preset.weight_decay),
            lr=preset.learning_rate,
            momentum=preset.momentum,
            nesterov=preset.nesterov,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, _learning_rate_factor(preset, config.epochs, self.steps_per_epoch)
        )
        self.progress = Progress()
        # Epochs compete on this half alone, so that the other half can still certify the winner.
        parts = split_validation(data.validation.groups, verify_share=0.0, best=True)
        self.validation = data.validation.subset(parts.selection)

    def _start_from(self, run: Run) -> None:
        """Take over the weights of a run on the same data, classes and shapes; nothing else of it.

        Other data are refused: what that run trained on may be what this one validates and calibrates with.
        """
        now, then = (
            {key: value for key, value in config.data_options.items() if key not in _NOT_SPLIT}
            | {"protocol": config.protocol}
            for config in (self.config, run.config)
        )
        if now != then:
            raise ValueError(
                f"initial_weights={run.folder} was trained on {then}, this run on {now}; images that it trained on could "
                "calibrate this one, so both need the same protocol, split and source of images"
            )
        state = run.load_checkpoint()
        if state["class_ids"] != list(self.data.class_ids):
            raise ValueError(
                f"initial_weights={run.folder} was trained on other classes ({len(state['class_ids'])}) than the data "
                f"hold ({len(self.data.class_ids)})"
            )
        try:
            self.model.load_state_dict(state["averaged"] or state["model"])
        except RuntimeError as error:
            raise ValueError(
                f"initial_weights={run.folder} holds another network or head than this run: {error}"
            ) from error

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything needed to continue: weights, optimizer, schedule, position, history, random state."""
        head = self.model["head"]
        return {
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.module.state_dict(),
            "averaged_count": 0 if self.averaged is None else int(self.averaged.n_averaged),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": vars(self.progress),
            "random": torch.get_rng_state(),
            "num_classes": len(self.data.class_ids),
            "class_ids": list(self.data.class_ids),
            "data_sha256": _fingerprint(self.data.train),
            "head_scale": getattr(head, "scale", None),
        }

    def save(self, name: str = LAST) -> None:
        """Write a checkpoint atomically; a kill never leaves half a file.

        Raises:
            TrainingDiverged: a weight is not finite; the file stays as it was.
            OSError: the disk is full or gone; the file stays as it was.
        """
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise self._diverged("the weights hold a value that is not finite")
        target = self.folder / name
        partial = target.with_name(name + ".partial")
        try:
            torch.save(self.state(), partial)
            os.replace(partial, target)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {target} ({error}); earlier checkpoints are intact, free space and rerun"
            ) from error

    def resume(self) -> bool:
        """Continue from ``last.pt`` if it is there; True if so."""
        file = self.folder / LAST
        if not file.is_file():
            return False
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["class_ids"] != list(self.data.class_ids):
            raise ValueError(
                f"{file} was trained on {len(state['class_ids'])} other classes than the data now hold "
                f"({len(self.data.class_ids)}); use another NAME= or the former data"
            )
        # Checkpoints of earlier releases do not know their data.
        if state.get("data_sha256", _fingerprint(self.data.train)) != _fingerprint(self.data.train):
            raise ValueError(
                f"{file} was trained on other images than {self.config.data or 'the data'} now holds; "
                "use another NAME= or the former data"
            )
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(state["averaged"])
            self.averaged.n_averaged.fill_(state["averaged_count"])
        self.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"].cpu())
        return True

    # -- training ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the last epoch and return the last row of the history.

        Ctrl-C is honoured between two steps: the checkpoint then holds all of the last step and nothing of the next.

        Raises:
            TrainingDiverged: the loss, a weight or a validation figure is not finite.
            KeyboardInterrupt: after the checkpoint was written.
        """
        config = self.config
        with (
            self.interrupt,
            _writer(
                self.folder / "tensorboard", self.progress.epoch * self.steps_per_epoch
            ) as writer,
        ):
            while self.progress.epoch < config.epochs:
                self._train_epoch(writer)
                row = self._validate()
                self._finish_epoch(row, writer)
        return self.progress.history[-1] if self.progress.history else {}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        return iter(
            training_loader(
                self.data.train,
                preprocessing=self.data.preprocessing,
                augmentation=config.training.augmentation,
                batch_size=config.training.batch_size,
                seed=config.seed,
                epoch=self.progress.epoch,
                workers=config.workers,
                include_negatives=self.uses_negatives,
                skip_batches=self.progress.step,
            )
        )

    def _train_epoch(self, writer: SummaryWriter) -> None:
        progress, preset = self.progress, self.config.training
        self.model.train()
        self.criterion.train()
        if hasattr(self.criterion, "set_epoch"):
            self.criterion.set_epoch(progress.epoch)
        loss_sum = torch.full((), progress.loss_sum, dtype=torch.float64, device=self.device)
        saved_at = time.monotonic()
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch + 1}/{self.config.epochs}",
            disable=not self.show_progress,
            mininterval=1.0,
        )
        try:
            for images, labels in self._batches():
                loss = self._step(images, labels, preset)
                loss_sum += loss.detach().double() * len(labels)
                progress.step += 1
                progress.sample_count += len(labels)
                bar.update()
                if progress.step % LOG_EVERY == 0 or progress.step == self.steps_per_epoch:
                    progress.loss_sum = float(loss_sum)  # the only synchronisation with the device
                    self._check_finite(progress.loss_sum)
                    mean = progress.loss_sum / progress.sample_count
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    writer.add_scalar(
                        "train/loss", mean, progress.epoch * self.steps_per_epoch + progress.step
                    )
                    if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                        self.save()
                        saved_at = time.monotonic()
                if self.interrupt.requested:
                    break
        finally:
            bar.close()
        progress.loss_sum = float(loss_sum)
        self._check_finite(progress.loss_sum)
        self._stop_if_interrupted()

    def _stop_if_interrupted(self) -> None:
        if self.interrupt.requested:
            self.save()
            raise KeyboardInterrupt

    def _step(self, images: Tensor, labels: Tensor, preset: Preset) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        batch = self.data.preprocessing.normalize(images).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=preset.precision == "bfloat16"
        ):
            features = self.model["network"](batch)
        loss: Tensor = self.criterion(self.model["head"](features), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if preset.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), preset.max_gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return loss

    def _check_finite(self, loss_sum: float) -> None:
        if not math.isfinite(loss_sum):
            raise self._diverged(f"the loss is {loss_sum}")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{self.config.loss}: {what} in epoch {self.progress.epoch + 1}, at or before step {self.progress.step}; "
            f"the last sound checkpoint is {self.folder / LAST}. Try a smaller learning_rate, max_gradient_norm=5, "
            "margin_warmup_epochs=5 or detach_radial=true (OPTIONS=...)"
        )

    def _finish_epoch(self, row: dict[str, Any], writer: SummaryWriter) -> None:
        progress = self.progress
        for name, value in row.items():
            if not math.isfinite(value):
                raise self._diverged(f"{name} is {value}")
        row = {
            "epoch": progress.epoch + 1,
            "train_loss": progress.loss_sum / max(progress.sample_count, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **row,
        }
        progress.history.append(row)
        progress.epoch += 1
        progress.step, progress.loss_sum, progress.sample_count = 0, 0.0, 0
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(f"epoch/{name}", value, row["epoch"])
        is_best = row["confidence"] > progress.best_confidence
        progress.best_confidence = max(progress.best_confidence, row["confidence"])
        # The best one first: the last one says that the epoch is over, and with it that this was done.
        if is_best:
            self.save(BEST)
        self.save()
        write_atomically(self.folder / HISTORY, json.dumps(progress.history, indent=2) + "\n")
        logger.info(
            "epoch %d/%d: train loss %.4f, margin-free validation loss %.4f, accuracy %.4f, confidence %.4f%s",
            row["epoch"], self.config.epochs, row["train_loss"], row["validation_loss_without_margin"],
            row["validation_accuracy"], row["confidence"], " (best)" if is_best else "",
        )  # fmt: skip

    def _validate(self) -> dict[str, float]:
        model = self.model if self.averaged is None else self.averaged.module
        return validate(model, self.validation, self.data.preprocessing, self.device, self.config)


@torch.inference_mode()
def validate(
    model: nn.ModuleDict,
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    config: TrainConfig,
) -> dict[str, float]:
    """Closed-set accuracy and the thesis' validation confidence, on margin-free logits.

    ``known_confidence`` = mean p_y over knowns, ``negative_confidence`` = mean(1 + 1/C - max_c p_c) over negatives,
    ``confidence`` = their sum (at most 2). They depend on the scale, so they do not compare losses.
    """
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    for images, labels, _ in split.batches(256, preprocessing, workers=config.workers):
        batch = preprocessing.normalize(images.to(device)).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(
            device.type, torch.bfloat16, enabled=config.training.precision == "bfloat16"
        ):
            features = model["network"](batch)
        output = model["head"](features)
        logits = output.logits
        on_device = torch.as_tensor(labels).to(device)
        known, negative = is_known(on_device), is_negative(on_device)
        log_probabilities = all_logits(output).log_softmax(dim=1)[:, : logits.shape[1]].double()
        of_label = log_probabilities.gather(1, on_device.clamp(min=0)[:, None]).squeeze(1)
        foreign = 1 + 1 / logits.shape[1] - log_probabilities.amax(dim=1).exp()
        correct = logits.argmax(dim=1) == on_device
        sums += torch.stack(
            [
                known.sum(), negative.sum(), (known * correct).sum(),
                (known * of_label.exp()).sum(), (negative * foreign).sum(), (known * -of_label).sum(),
            ]
        )  # fmt: skip
    knowns, negatives, correct, probability, foreign, loss = sums.tolist()
    known_confidence = probability / max(knowns, 1)
    negative_confidence = foreign / max(negatives, 1)
    return {
        "validation_loss_without_margin": loss / max(knowns, 1),
        "validation_accuracy": correct / max(knowns, 1),
        "known_confidence": known_confidence,
        "negative_confidence": negative_confidence,
        "confidence": known_confidence + negative_confidence,
    }


def _fingerprint(split: Split) -> str:
    """Digest of what is trained on: which samples, of which classes, in which order; not where they lie."""
    digest = hashlib.sha256()
    for values in (split.sample_ids, split.groups):
        digest.update("\n".join(values.tolist()).encode())
    if not isinstance(split.images, ImageFiles):
        digest.update(split.images[:: max(1, len(split) // 1000)].numpy().tobytes())
    return digest.hexdigest()


def prepare_folder(folder: Path, config: TrainConfig) -> bool:
    """Create the run's folder, or check that the one there belongs to the same run; True if it is to be resumed.

    Raises:
        ValueError: the folder holds a run with another configuration, or one that is trained further.
    """
    file = folder / CONFIG
    if file.is_file():
        former = TrainConfig.from_json(file.read_text())
        now, then = json.loads(config.to_json()), json.loads(former.to_json())
        changed = sorted(
            key
            for key in now
            if now[key] != then[key] and key not in ("data", "device", "workers", "epochs")
        )
        if changed:
            raise ValueError(
                f"{folder} holds a run with another configuration (different: {', '.join(changed)}); "
                "give this one another NAME= or remove that folder"
            )
        if config.epochs != former.epochs and config.training.schedule != "constant":
            raise ValueError(
                f"{folder} was started with epochs={former.epochs}; its {config.training.schedule} schedule depends on "
                f"that number, so it cannot go on with {config.epochs}. Give this run another NAME="
            )
        if config.epochs < former.epochs:
            raise ValueError(
                f"{folder} was started with epochs={former.epochs}, more than the {config.epochs} now asked for; "
                "give this run another NAME="
            )
        return True
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, config.to_json())
    return False


@contextmanager
def _writer(folder: Path, purge_step: int) -> Iterator[SummaryWriter]:
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    try:
        yield writer
    finally:
        writer.close()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on weights alone: not on norms, biases, activations or centers."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or name.startswith("head.") else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def _learning_rate_factor(
    preset: Preset, epochs: int, steps_per_epoch: int
) -> Callable[[int], float]:
    warmup, total = preset.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if preset.schedule not in ("constant", "cosine"):
        raise ValueError(f'schedule must be "constant" or "cosine", got {preset.schedule!r}')

    def factor(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if preset.schedule == "constant":
            return ramp
        return ramp * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(total, 1))))

    return factor


def _ramped_average(decay: float | None) -> Callable[[list[Tensor], list[Tensor], int], None]:
    """Exponential average whose memory grows with the number of updates, so that short runs are not held back."""
    limit = decay or 0.0

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Any) -> None:
        weight = 1.0 - min(limit, (1.0 + float(count)) / (10.0 + float(count)))
        for target, source in zip(averaged, current, strict=True):
            if target.is_floating_point():
                target.lerp_(source.to(target.dtype), weight)
            else:
                target.copy_(source)

    return update
