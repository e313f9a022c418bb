"""The containers' limits against the gateway's own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.settings import Settings

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
PROGRAM_BYTES = 256 * MIB
COPIES = 3  # of a form: the body, its parts in a temporary file (which a container keeps in memory), the images


def service(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    return content["services"][name]


def default_of(text: str) -> str:
    """``${NAME:-default}``."""
    found = re.fullmatch(r"\$\{\w+:-(.*)\}", text)
    assert found is not None, text
    return found.group(1)


def test_uploads_in_flight_fit_the_gateways_memory() -> None:
    gateway = service("gateway")
    budget = int(default_of(gateway["environment"]["OPENSET_MAX_BYTES_IN_FLIGHT"]))
    assert budget == Settings.model_fields["max_bytes_in_flight"].default
    assert default_of(gateway["mem_limit"]) == "1g"
    assert COPIES * budget + PROGRAM_BYTES <= 1024 * MIB


@pytest.mark.parametrize("name", ["request_fpr", "max_pixels"])
def test_setting_of_the_gateway_is_one_of_the_containers_too(name: str) -> None:
    given = default_of(service("gateway")["environment"][f"OPENSET_{name.upper()}"])
    assert given == str(Settings.model_fields[name].default)


def test_both_containers_know_the_same_deadline() -> None:
    deadlines = {service(n)["environment"]["OPENSET_DEADLINE_S"] for n in ("gateway", "torchserve")}
    assert {float(default_of(text)) for text in deadlines} == {
        Settings.model_fields["deadline_s"].default
    }


@pytest.mark.parametrize("file", ["docker/Dockerfile.gateway", "serving/stack.py"])
def test_admission_alone_refuses_and_never_the_web_server_in_plain_text(file: str) -> None:
    assert "limit-concurrency" not in (ROOT / file).read_text()


def test_gateway_image_holds_every_module_of_openset_that_the_gateway_imports() -> None:
    used = {
        name
        for source in (ROOT / "api").rglob("*.py")
        for name in re.findall(r"^from openset\.(\w+) import", source.read_text(), re.MULTILINE)
    }
    copied = (ROOT / "docker/Dockerfile.gateway").read_text()
    assert used
    assert not [name for name in used if f"openset/{name}.py" not in copied]


def test_up_starts_both_containers_anew_so_that_a_new_archive_is_served(tmp_path: Path) -> None:
    """The archive lies in a bind mount: compose sees no difference and would leave the old model in memory."""
    program, said = tmp_path / "compose", tmp_path / "said"
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    program.chmod(0o755)
    subprocess.run(["make", "up", "MODEL=demo", f"COMPOSE={program}"], cwd=ROOT, check=True)
    [up] = [line for line in said.read_text().splitlines() if " up " in line]
    assert {"--force-recreate", "--wait"} <= set(up.split())


@pytest.mark.parametrize("name", ["gateway", "torchserve"])
def test_sources_of_a_strict_umask_can_be_read_by_the_images_user(name: str) -> None:
    text = (ROOT / f"docker/Dockerfile.{name}").read_text()
    copied, allowed, user = (
        text.rindex(part) for part in ("\nCOPY ", "chmod -R a+rX /app", "\nUSER ")
    )
    assert copied < allowed < user
