"""How an epoch is judged: closed-set accuracy and the thesis' validation confidence."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from openset.labels import is_known, is_negative
from openset.preprocessing import Preprocessing
from openset.scores import all_logits
from training.batches import ALONE, Share
from training.data import Split
from training.parallel import add_up
from training.runs import TrainConfig
from training.step import Normalizer

_BATCH_SIZE = 256


@torch.inference_mode()
def validate(
    model: nn.ModuleDict,
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    config: TrainConfig,
    share: Share = ALONE,
) -> dict[str, float]:
    """Judge margin-free logits.

    ``known_confidence`` = mean p_y over knowns, ``negative_confidence`` = mean(1 + 1/C - max_c p_c) over negatives,
    ``confidence`` = their sum (at most 2). They depend on the scale, so they do not compare losses.

    Args:
        model: "network" and "head".
        split: what to judge on; several processes take their share of it each and add up.
        preprocessing: the evaluation's.
        device: of the model.
        config: of the run.
        share: of the samples.
    """
    model.eval()
    normalizer = Normalizer(preprocessing, device)
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    own = (
        split
        if share.count == 1
        else split.subset(np.arange(len(split))[share.rank :: share.count])
    )
    for images, labels, _ in own.batches(_BATCH_SIZE, preprocessing, workers=config.workers):
        batch = normalizer(images.to(device, non_blocking=True))
        with torch.autocast(
            device.type, torch.bfloat16, enabled=config.training.precision == "bfloat16"
        ):
            features = model["network"](batch)
        output = model["head"](features)
        logits = output.logits
        on_device = torch.as_tensor(labels).to(device, non_blocking=True)
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
    knowns, negatives, correct, probability, foreign, loss = add_up(sums, share).tolist()
    known_confidence = probability / max(knowns, 1)
    negative_confidence = foreign / max(negatives, 1)
    return {
        "validation_loss_without_margin": loss / max(knowns, 1),
        "validation_accuracy": correct / max(knowns, 1),
        "known_confidence": known_confidence,
        "negative_confidence": negative_confidence,
        "confidence": known_confidence + negative_confidence,
    }
