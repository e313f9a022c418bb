"""Gateways over a stub on a real Unix socket; stores on SQLite and, where it is installed, PostgreSQL."""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.settings import Settings
from tests.factories import tiny_artifact
from tests.stub_torchserve import StubTorchServe, small_archive

StartGateway = Callable[..., Any]


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return small_archive(tiny_artifact(folder / "artifact"), folder / "tiny.mar")


@pytest.fixture
async def stub(archive: Path) -> AsyncIterator[StubTorchServe]:
    folder = Path(tempfile.mkdtemp(prefix="os-"))  # short: a Unix socket path has at most 107 bytes
    server = StubTorchServe(archive)
    server.socket = folder / "s"  # type: ignore[attr-defined]
    runner = await server.start(folder / "s")
    yield server
    await runner.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


def declared_statuses(document: dict[str, Any], method: str, path: str) -> set[str] | None:
    """What an OpenAPI description says an operation answers with; None where it describes no such operation."""
    for template, operations in document["paths"].items():
        pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
        if re.fullmatch(pattern, path) and method.lower() in operations:
            return set(operations[method.lower()]["responses"])
    return None


def check_declared(document: dict[str, Any]) -> Callable[[httpx.Response], Awaitable[None]]:
    """A hook for clients: each answer of each test must be one that the OpenAPI description declares."""

    async def check(response: httpx.Response) -> None:
        request = response.request
        statuses = declared_statuses(document, request.method, request.url.path)
        assert statuses is None or str(response.status_code) in statuses, (
            f"{request.method} {request.url.path} answered {response.status_code}, declared are {sorted(statuses)}"
        )

    return check


@pytest.fixture
async def start_gateway(
    stub: StubTorchServe, archive: Path, tmp_path: Path
) -> AsyncIterator[StartGateway]:
    """``await start_gateway(**settings)`` -> httpx client of a gateway with its lifespan running."""
    async with AsyncExitStack() as stack:

        async def start(**changes: Any) -> httpx.AsyncClient:
            values: dict[str, Any] = {
                "archive": archive,
                "inference_socket": stub.socket,  # type: ignore[attr-defined]
                "database_url": f"sqlite:///{tmp_path / 'store.db'}",
                "deadline_s": 60.0,
                "ready_seconds": 0.0,
            }
            app = create_app(Settings(**(values | changes)))
            await stack.enter_async_context(app.router.lifespan_context(app))
            client = httpx.AsyncClient(
                transport=httpx.ASGITransport(app, raise_app_exceptions=False),
                base_url="http://gateway",
                event_hooks={"response": [check_declared(app.openapi())]},
            )
            client.app = app  # type: ignore[attr-defined]
            return await stack.enter_async_context(client)

        yield start


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> httpx.AsyncClient:
    return await start_gateway()


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL server of our own, on loopback, in a temporary folder."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    binaries = Path(found[-1]).parent
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    folder.chmod(0o777)
    # initdb refuses to run as root; the Debian package made this user.
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    command = [*prefix, str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-U", "test"]
    subprocess.run(command, check=True, capture_output=True, cwd="/")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*prefix, str(binaries / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run(
        [*control, "-l", str(folder / "log"), "-o", options, "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        yield f"postgresql+psycopg://test@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd="/"
        )
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    url: str = request.getfixturevalue("postgresql_url")
    import sqlalchemy as sa

    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return url
