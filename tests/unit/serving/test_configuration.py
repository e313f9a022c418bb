"""What the configuration files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from serving.configuration import ServingSettings, model_config


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
