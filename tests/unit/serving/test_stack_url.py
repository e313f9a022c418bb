"""The address that the stack polls and prints, for whatever it is told to listen on."""

from __future__ import annotations

from pathlib import Path

import pytest
from yarl import URL

from serving.configuration import ServingSettings
from serving.stack import Gateway


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("2001:db8::7", "http://[2001:db8::7]:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_url_has_brackets_around_ipv6_and_an_address_that_can_be_called(
    tmp_path: Path, host: str, url: str
) -> None:
    (tmp_path / "tiny.mar").touch()
    settings = ServingSettings(model="tiny", model_store=tmp_path, run_dir=tmp_path)
    gateway = Gateway(settings, host=host, port=8000, processes=1, database_url="sqlite://")
    assert gateway.url == url
    assert URL(gateway.url).port == 8000  # as aiohttp reads it
