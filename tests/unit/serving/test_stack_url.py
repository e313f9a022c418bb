"""What the stack tells its gateway: the address to listen on, which it polls and prints, and the database."""

from __future__ import annotations

from pathlib import Path

import pytest
from yarl import URL

from serving import stack
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


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [
        ("postgresql://given", "postgresql://exported", "postgresql://given"),
        (None, "postgresql://exported", "postgresql://exported"),
        (None, "", "sqlite:///{}/tiny.calibrations.db"),
        (None, None, "sqlite:///{}/tiny.calibrations.db"),
    ],
)
def test_database_is_the_arguments_else_the_environments_else_a_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argument: str | None,
    environment: str | None,
    expected: str,
) -> None:
    (tmp_path / "tiny.mar").touch()
    used = []

    async def noted(_: ServingSettings, gateway: Gateway) -> int:
        used.append(gateway.database_url)
        return 0

    monkeypatch.setattr(stack, "run_stack", noted)
    monkeypatch.delenv("OPENSET_DATABASE_URL", raising=False)
    if environment is not None:
        monkeypatch.setenv("OPENSET_DATABASE_URL", environment)
    arguments = ["--model", "tiny", "--model-store", str(tmp_path)]
    assert stack.main([*arguments, *(["--database-url", argument] if argument else [])]) == 0
    assert used == [expected.format(tmp_path.resolve())]
