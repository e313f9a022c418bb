"""Compiled backbones: the sizes they are asked for."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from handlers.open_set_handler import OpenSetHandler
from openset.buckets import BUCKETS, buckets_up_to
from openset.compilation import compile_backbone, filled_up
from serving.configuration import ServingSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (16, [1, 2, 4, 8, 16])]
)
def test_buckets_cover_every_batch(batch_size: int, expected: list[int]) -> None:
    assert buckets_up_to(batch_size) == expected
    for count in range(1, batch_size + 1):
        assert len(filled_up(torch.ones(count, 1, 2, 2))) in expected


def test_filling_up_keeps_the_images_and_adds_black_ones() -> None:
    images = torch.randint(1, 256, (3, 3, 4, 4), dtype=torch.uint8)
    filled = filled_up(images)
    assert filled.shape == (4, 3, 4, 4)
    assert torch.equal(filled[:3], images)
    assert not filled[3].any()
    assert filled_up(filled) is filled


def test_larger_than_all_buckets_stays_as_it_is() -> None:
    assert len(filled_up(torch.ones(BUCKETS[-1] + 1, 1))) == BUCKETS[-1] + 1


@pytest.mark.parametrize(("compiled", "expected"), [(False, {1: 1, 2: 1, 3: 1}), (True, {1: 3, 2: 3, 4: 3})])  # fmt: skip
def test_worker_is_ready_only_after_every_size_was_warmed_up_and_recorded(
    compiled: bool, expected: dict[int, int]
) -> None:
    called: Counter[int] = Counter()

    def predict(images: torch.Tensor) -> None:
        called[len(images)] += 1

    handler = OpenSetHandler()
    handler.classifier = SimpleNamespace(  # type: ignore[assignment]
        preprocessing=SimpleNamespace(image_size=2, channels=1),
        path=SimpleNamespace(mode="compiled" if compiled else "eager"),
        device=torch.device("cpu"),
        predict=predict,
    )
    handler._warm_up(3)
    assert called == expected


_CACHE_AFTER_COMPILING = """
import os, sys, torch
import torchvision  # names torch's own folder in the environment
from openset.compilation import compile_backbone
compile_backbone(torch.nn.Linear(2, 2), torch.device("cpu"))
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_worker_calibration_and_benchmark_share_one_cache_of_compiled_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / given))
    found = subprocess.run(
        [sys.executable, "-c", _CACHE_AFTER_COMPILING], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip
    (tmp_path / "tiny.mar").touch()
    settings = ServingSettings(model="tiny", model_store=tmp_path, run_dir=tmp_path)
    assert found == str(settings.compile_cache if given is None else tmp_path / given)


def test_every_size_is_compiled_and_none_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: real(network, dynamic=False, backend=backend))  # fmt: skip
    network = compile_backbone(torch.nn.Linear(2, 2), torch.device("cpu"))
    for size in BUCKETS:
        network(torch.zeros(size, 2))
    assert len(compiled) == len(BUCKETS)
