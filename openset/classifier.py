"""The one path that decides: network + preprocessing + score + tau, for evaluation, calibration and serving."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from contextlib import contextmanager
from threading import Barrier
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openset.compilation import compile_backbone, filled_up
from openset.decision import accept
from openset.fitted_scores import choose_scores
from openset.heads import Head, OpenSetOutput
from openset.model_card import ModelCard, PathIdentity
from openset.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

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
    if not wanted:
        yield
        return
    former = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = former


# Two cores with one image each were slower than both at one after the other (docs/results/serving-speed.md).
LEAST_PART = 2
_START_S = 60.0


class OpenSetClassifier:
    """A trained model, ready to answer.

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
        self.path = PathIdentity(digest, self.device.type, precision, compiled)
        self.network = network.to(self.device).to(memory_format=torch.channels_last).eval()
        self.head = head.to(self.device).eval()
        self.fitted = {name: score.to(self.device).eval() for name, score in (fitted or {}).items()}
        self.scores = choose_scores(card.scores, self.fitted)
        self._features = compile_backbone(self.network, self.device) if compiled else self.network
        self._cores = 1
        self._pool: ThreadPoolExecutor | None = None

    def compute_side_by_side(
        self, cores: int, *, prepare: Callable[[], None] = lambda: None
    ) -> bool:
        """Give every core a part of its own of a batch that has two images or more for each, instead of a share of each image.

        Cores that share an image wait for each other at every layer, also while the web server takes one of them for a moment.
        Small networks lose by it: a thread that shared an image spins for a while, and the parts want its core.
        For an eager backbone on a CPU; elsewhere nothing changes. Not while another thread predicts.

        Args:
            cores: parts of a batch, each computed by one thread; 1 goes back to sharing.
            prepare: called first in each of these threads.

        Returns:
            Whether batches are computed so from now on; not where ``prepare`` fails.
        """
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if cores < 2 or self.device.type != "cpu" or self.path.compiled:
            return False
        together = Barrier(cores)

        def alone() -> None:
            try:
                prepare()
                torch.get_num_threads()  # else the process' number would replace the next one at the first computation
                torch.set_num_threads(1)
                together.wait(_START_S)  # so that each of the tasks below starts a thread
            except BaseException:
                together.abort()
                raise

        former = torch.get_num_threads()
        pool = ThreadPoolExecutor(cores, thread_name_prefix="compute", initializer=alone)
        try:
            for started in [pool.submit(torch.get_num_threads) for _ in range(cores)]:
                started.result()
        except BrokenThreadPool:
            pool.shutdown()
            logger.warning("the threads of %d cores did not start; they share every image", cores)
            return False
        finally:
            torch.set_num_threads(former)  # also what threads of others begin with
        self._cores, self._pool = cores, pool
        return True

    @torch.inference_mode()
    def _backbone(self, batch: Tensor) -> Tensor:
        with (
            exact_convolutions(self.device.type == "cuda" and self.precision == "float32"),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"),
        ):
            features: Tensor = self._features(batch)
            return features

    def _features_of(self, batch: Tensor) -> Tensor:
        pool = self._pool
        if pool is None or len(batch) < LEAST_PART * self._cores:
            return self._backbone(batch)
        parts = batch.tensor_split(self._cores)
        return torch.cat(list(pool.map(self._backbone, parts)))

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """Score images in evaluation form, uint8 (N, channels, H, W), on any device."""
        sent = filled_up(images) if self.path.compiled else images
        batch = self.preprocessing.normalize(sent.to(self.device, non_blocking=True))
        batch = batch.contiguous(memory_format=torch.channels_last)
        output = self.head(self._features_of(batch)[: len(images)])
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
