"""The one path that decides: network + preprocessing + score + tau, for evaluation, calibration and serving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openset.compilation import compile_backbone, filled_up
from openset.decision import accept
from openset.fitted_scores import choose_scores
from openset.heads import Head, OpenSetOutput
from openset.model_card import ModelCard, PathIdentity
from openset.packing import can_pack, packed_backbone
from openset.preprocessing import Preprocessing

PRECISIONS = ("float32", "bfloat16")

# Scores of one path agree between batch sizes up to this much (log-odds or logits); see tests/unit/openset. A LeNet++ trained
# on glyphs differed by at most 2e-6 in bfloat16 between batches of 1 and of 2 to 512 images (a CPU with AVX512-BF16; other
# devices, which may sum in another order for another batch size, were not measured). That order can move a score about as far
# as the rounding itself, which moved the same scores by at most 0.066 away from float32's: hence the limit.
SCORE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


class Prediction(NamedTuple):
    """What the classifier computes for N images, all on its device.

    Attributes:
        output: features, cosines, radii, logits.
        scores: by score type, each (N,) float32.
        predictions: index of the largest logit, (N,) int64.
    """

    output: OpenSetOutput
    scores: dict[str, Tensor]
    predictions: Tensor


@contextmanager
def exact_convolutions(wanted: bool) -> Iterator[None]:
    """Within, cuDNN does not round float32 convolutions to TF32, with which scores depend on the batch; if that is wanted.

    The setting is the process'; a training before or after keeps its own.
    """
    former = torch.backends.cudnn.allow_tf32
    if wanted:
        torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = former


def path_mode(device: str, precision: str, *, compiled: bool) -> str:
    """How a backbone is computed on a device, see ``PathIdentity.mode``."""
    if compiled:
        return "compiled"
    return "packed" if device == "cpu" and can_pack(precision) else "eager"


class OpenSetClassifier:
    """A trained model, ready to answer.

    Later changes of ``network`` do not reach a packed or compiled backbone.

    Args:
        network: images -> features.
        head: features -> OpenSetOutput.
        card: the model card; it names the scores.
        fitted: scores with a state among them, by name.
        preprocessing: uploads -> model input; from the card if None.
        device: "cpu" or "cuda" or "cuda:1".
        precision: of the backbone, "float32" or "bfloat16"; the head is always float32.
        compiled: compile the backbone (needs a compiler on the host, and minutes).
        digest: ``openset.model_card.path_digest`` of weights, card and preprocessing.
    """

    def __init__(
        self,
        network: nn.Module,
        head: Head,
        card: ModelCard,
        *,
        fitted: Mapping[str, nn.Module] | None = None,
        preprocessing: Preprocessing | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        compiled: bool = False,
        digest: str = "",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        self.device = torch.device(device)
        self.card = card
        self.preprocessing = preprocessing or Preprocessing.from_dict(card.preprocessing)
        self.precision = precision
        mode = path_mode(self.device.type, precision, compiled=compiled)
        self.path = PathIdentity(digest, self.device.type, precision, mode)
        self.network = network.to(self.device).to(memory_format=torch.channels_last).eval()
        self.head = head.to(self.device).eval()
        self.fitted = {name: score.to(self.device).eval() for name, score in (fitted or {}).items()}
        self.scores = choose_scores(card.scores, self.fitted)
        self.backbone = self._backbone(mode)

    def _backbone(self, mode: str) -> nn.Module:
        if mode == "compiled":
            compiled: nn.Module = compile_backbone(self.network, self.device)
            return compiled
        if mode == "packed":
            side, channels = self.preprocessing.image_size, self.preprocessing.channels
            with torch.inference_mode():
                return packed_backbone(
                    self.network, torch.zeros(1, channels, side, side), self.precision
                )
        return self.network

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """Score images in evaluation form, uint8 (N, channels, H, W), on any device."""
        sent = filled_up(images) if self.path.mode == "compiled" else images
        if self.device.type == "cuda" and sent.device.type == "cpu":
            sent = sent.pin_memory()  # else the copy to the device would wait
        batch = self.preprocessing.normalize(sent.to(self.device, non_blocking=True))
        batch = batch.contiguous(memory_format=torch.channels_last)
        rounds = self.precision == "bfloat16" and self.path.mode != "packed"
        with (
            exact_convolutions(self.device.type == "cuda" and self.precision == "float32"),
            torch.autocast(self.device.type, torch.bfloat16, enabled=rounds),
        ):
            features = self.backbone(batch)[: len(images)]
        output = self.head(features)
        scores = {name: score(output) for name, score in self.scores.items()}
        return Prediction(output, scores, output.logits.argmax(dim=1))

    def decide(
        self, prediction: Prediction, taus: Tensor, score_types: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Apply one threshold per image, on the device.

        Args:
            prediction: of N images.
            taus: thresholds in the unit of each image's score, (N,) float32.
            score_types: which score each image is judged by, N entries.

        Returns:
            The scores that were compared, (N,) float32, and whether each is accepted, (N,) bool. A non-finite score is
            never accepted.
        """
        names = list(prediction.scores)
        stacked = torch.stack([prediction.scores[name] for name in names])
        rows = torch.tensor(
            [names.index(score_type) for score_type in score_types], device=self.device
        )
        chosen = stacked.gather(0, rows[None, :]).squeeze(0)
        accepted = accept(chosen, taus.to(self.device)) & torch.isfinite(chosen)
        return chosen, accepted
