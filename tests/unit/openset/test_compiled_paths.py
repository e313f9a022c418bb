"""Really compiled backbones, on every device that is there: their scores are those of the backbone as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from openset.artifact import load_artifact
from openset.classifier import SCORE_TOLERANCE
from openset.compilation import CALLS_UNTIL_RECORDED
from tests.factories import tiny_artifact

ON_CUDA = [("cuda", "float32"), ("cuda", "bfloat16")]
PATHS = [("cpu", "float32"), *(ON_CUDA if torch.cuda.is_available() else [])]


@pytest.mark.parametrize(("device", "precision"), PATHS)
def test_compiled_scores_are_those_of_the_plain_path_at_every_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str
) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        # Continuous integration installs one and takes a skip for a failure.
        pytest.skip("no C++ compiler: Debian's g++ is one")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    folder = tiny_artifact(tmp_path / "artifact")
    plain = load_artifact(folder, device=device, precision=precision)
    compiled = load_artifact(folder, device=device, precision=precision, compiled=True)
    assert compiled.path.mode == "compiled"
    side, channels = plain.preprocessing.image_size, plain.preprocessing.channels
    images = torch.randint(0, 256, (4, channels, side, side), dtype=torch.uint8)
    for count in (1, 2, 3, 4):  # three are filled up to four
        expected = plain.predict(images[:count]).scores["softmax"].cpu()
        for _ in range(CALLS_UNTIL_RECORDED + 1):  # the last ones replay a recorded graph on CUDA
            found = compiled.predict(images[:count]).scores["softmax"].cpu()
            torch.testing.assert_close(found, expected, atol=SCORE_TOLERANCE[precision], rtol=0)
    assert any((tmp_path / "code").rglob("*")), "nothing was compiled"
