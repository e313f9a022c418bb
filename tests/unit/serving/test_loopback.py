"""What speaks to this machine's loopback does so without the proxy that the environment names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from serving import demo

ROOT = Path(__file__).parents[3]


class Ready(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b'{"ready": true}')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nothing listens there
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_demo_asks_its_stack_without_the_proxy(port: int) -> None:
    assert demo.call("GET", f"http://127.0.0.1:{port}/") == {"ready": True}


@pytest.mark.parametrize("status", [200, 503])
def test_health_check_of_the_gateways_container_asks_without_the_proxy_and_says_what_came(
    port: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ready, "status", status)
    text = (ROOT / "docker/Dockerfile.gateway").read_text()
    found = re.search(r"HEALTHCHECK.*?CMD (\[.*?\])$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    _, *arguments = json.loads(found.group(1).replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == (status != 200)
    assert done.stdout == '{"ready": true}\n'


@pytest.mark.parametrize("folder", ["tests/e2e", "benchmarks"])
def test_clients_of_a_stack_on_this_machine_ask_without_the_proxy(folder: str) -> None:
    calls = [
        call
        for file in (ROOT / folder).rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in ("httpx.Client", "httpx.AsyncClient")
    ]
    assert calls
    assert not [text for text in map(ast.unparse, calls) if "trust_env=False" not in text]
