"""The supervisor's own prediction."""

from __future__ import annotations

import zipfile
from pathlib import Path

from serving.configuration import ServingSettings
from serving.torchserve import ManagementClient
from tests.factories import tiny_card


def client_of(folder: Path, **files: str) -> ManagementClient:
    with zipfile.ZipFile(folder / "tiny.mar", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.json", content)
    return ManagementClient(ServingSettings(model="tiny", model_store=folder, run_dir=folder))


def test_canary_brings_a_threshold_since_the_factorys_may_belong_to_another_path(
    tmp_path: Path,
) -> None:
    client = client_of(tmp_path, model_card=tiny_card(default_score="logit").to_json())
    sent = client._operating_point
    assert sent["x-openset-score"] == "logit"
    assert float(sent["x-openset-tau"]) == 0.0


def test_canary_of_another_product_brings_none(tmp_path: Path) -> None:
    assert client_of(tmp_path, manifest="{}")._operating_point == {}
