"""What the configuration files say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from openset.buckets import BUCKETS
from serving.configuration import ServingSettings, device_defaults, model_config


@pytest.mark.parametrize(("deadline", "shed_ms"), [(None, 12_000), ("2.5", 4_500)])
def test_what_the_gateway_gave_up_is_shed_a_little_after_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline: str | None, shed_ms: int
) -> None:
    monkeypatch.delenv("OPENSET_DEADLINE_S", raising=False)
    if deadline is not None:
        monkeypatch.setenv("OPENSET_DEADLINE_S", deadline)
    (tmp_path / "tiny.mar").touch()
    settings = ServingSettings(model="tiny", model_store=tmp_path, run_dir=tmp_path)
    assert yaml.safe_load(model_config(settings))["clientTimeoutInMills"] == shed_ms


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "tiny.mar").touch()
    return tmp_path


def test_a_single_cpu_worker_has_a_thread_bound_to_each_core(archive: Path) -> None:
    settings = ServingSettings(model="tiny", model_store=archive, run_dir=archive, device="cpu")
    assert settings.thread_environment({}) == {
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "OMP_PROC_BIND": "true",
    }


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"workers": 2}, True),
        ({"workers": 1}, False),
        ({"workers": 2, "compiled": True}, False),
        ({"workers": 2, "device": "cuda"}, False),
    ],
)
def test_several_eager_workers_of_a_cpu_share_its_cores(
    archive: Path, changes: dict[str, Any], shared: bool
) -> None:
    options: dict[str, Any] = {"device": "cpu", **changes}
    settings = ServingSettings(model="tiny", model_store=archive, run_dir=archive, **options)
    handler = yaml.safe_load(model_config(settings))["handler"]
    folder = str(archive / "tmp" / "cores")
    assert handler.get("shared_cores") == ({"folder": folder, "workers": 2} if shared else None)


@pytest.mark.parametrize(
    ("cores", "compiled", "workers"), [({0, 1}, False, 2), ({0, 1}, True, 1), ({0}, False, 1)]
)
def test_workers_of_a_cpu_are_no_more_than_can_share_it(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], compiled: bool, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert device_defaults("cpu", compiled=compiled)["workers"] == workers


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"workers": 2}, {}),
        ({"device": "cuda"}, {}),
        ({}, {"OMP_PROC_BIND": "false"}),
        ({}, {"GOMP_CPU_AFFINITY": "1 0"}),
    ],
)
def test_threads_are_not_bound_to_cores_that_others_hold_or_the_operator_chose(
    archive: Path, changes: dict[str, Any], given: dict[str, str]
) -> None:
    options: dict[str, Any] = {"device": "cpu", **changes}
    settings = ServingSettings(model="tiny", model_store=archive, run_dir=archive, **options)
    assert "OMP_PROC_BIND" not in settings.thread_environment(given)


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"workers": 2}, {}, "50000"),
        ({"workers": 2}, {"GOMP_SPINCOUNT": "0"}, None),
        ({"workers": 2}, {"OMP_WAIT_POLICY": "active"}, None),
        ({"workers": 1}, {}, None),
        ({"workers": 2, "device": "cuda"}, {}, None),
    ],
)
def test_threads_of_workers_that_share_cores_wait_asleep_before_long(
    archive: Path, changes: dict[str, Any], given: dict[str, str], expected: str | None
) -> None:
    options: dict[str, Any] = {"device": "cpu", **changes}
    settings = ServingSettings(model="tiny", model_store=archive, run_dir=archive, **options)
    assert settings.thread_environment(given).get("GOMP_SPINCOUNT") == expected


def test_batches_that_would_be_compiled_while_requests_wait_are_refused(archive: Path) -> None:
    def settings(**changes: Any) -> ServingSettings:
        return ServingSettings(model="tiny", model_store=archive, run_dir=archive, **changes)

    largest = BUCKETS[-1]
    assert settings(batch_size=largest, compiled=True).batch_size == largest
    assert settings(batch_size=largest + 1).batch_size == largest + 1
    with pytest.raises(ValueError, match=rf"at most {largest}, got {largest + 1}.*--batch-size"):
        settings(batch_size=largest + 1, compiled=True)


@pytest.mark.parametrize(("device", "plainly"), [("cpu", True), ("cuda", False)])
def test_java_leaves_the_cores_to_a_model_that_computes_on_them(
    archive: Path, device: str, plainly: bool
) -> None:
    settings = ServingSettings(
        model="tiny", model_store=archive, run_dir=archive, device=device, java_heap="2g"
    )
    options = settings.java_options()
    assert options[0] == "-Xmx2g"
    assert ("-XX:TieredStopAtLevel=1" in options) is plainly
