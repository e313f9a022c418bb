"""What is checked and written before Java starts; Java itself runs in the e2e tests."""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import re
import socket
import stat
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serving import serve, stack
from serving.configuration import ServingSettings, device_defaults
from serving.serve import add_serving_arguments, settings_from
from serving.supervisor import Supervisor
from serving.torchserve import TorchServe, TorchServeFailed, require_tools


def settings(folder: Path, **changes: Any) -> ServingSettings:
    (folder / "tiny.mar").touch()
    values = {"model": "tiny", "model_store": folder, "run_dir": folder / "run", **changes}
    return ServingSettings(**values)


def program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_relative_run_folder_is_made_absolute_since_java_starts_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = settings(tmp_path, run_dir=Path("run"))
    assert made.run_dir == tmp_path.resolve() / "run"
    assert made.inference_socket.is_absolute()


def test_second_instance_on_a_run_folder_is_refused_and_clears_nothing(tmp_path: Path) -> None:
    first, second = TorchServe(settings(tmp_path)), TorchServe(settings(tmp_path))
    first._lock_run_folder()
    with pytest.raises(TorchServeFailed, match="another instance runs in"):
        second._lock_run_folder()
    assert first._lock is not None
    first._lock.close()
    second._lock_run_folder()
    assert second._lock is not None
    second._lock.close()


async def test_stopped_instance_gives_its_run_folder_back(tmp_path: Path) -> None:
    first, second = TorchServe(settings(tmp_path)), TorchServe(settings(tmp_path))
    first._lock_run_folder()
    await first.stop()
    second._lock_run_folder()
    await second.stop()


async def test_run_folder_is_locked_against_cleaners_of_the_temporary_folder_until_the_end(
    tmp_path: Path,
) -> None:
    server = TorchServe(settings(tmp_path))
    server._lock_run_folder()
    folder = os.open(server.settings.run_dir, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):  # as systemd-tmpfiles tries it
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        await server.stop()
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)


@pytest.mark.parametrize("command", [serve, stack])
@pytest.mark.parametrize("step", ["the archive is looked for", "the archive is unpacked"])
def test_permission_that_is_missing_is_told_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: ModuleType,
    step: str,
) -> None:
    """Simulated, since the administrator may read everything."""
    made = settings(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(made.archive))

    if step == "the archive is looked for":
        monkeypatch.setattr(ServingSettings, "__post_init__", refuse)
    else:
        monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--model", "tiny", "--model-store", str(tmp_path), "--run-dir", str(made.run_dir)]
    if command is stack:
        arguments += ["--port", str(port)]
    with caplog.at_level("ERROR"):
        assert command.main(arguments) == 1
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(rf"Permission denied: '.*tiny\.mar'.* user {os.geteuid()}.*chmod a\+rX", said)


@pytest.mark.parametrize("name", ["ts/mine", "admin/mine/deep", "tmp/mine", "conf/mine", "conf"])
async def test_folder_that_holds_what_no_instance_wrote_is_refused_and_stays(
    tmp_path: Path, name: str
) -> None:
    made = settings(tmp_path)
    file = made.run_dir / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for _ in range(2):  # refused once, it must not pass for ours
        with pytest.raises(TorchServeFailed, match=r"would be deleted.*--run-dir"):
            await TorchServe(made).start()
    assert file.read_text() == "mine"
    assert not (made.run_dir / "lock").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("lock", ""), ("lock", "4711\n"), ("status.json", '{"state": "ready"}'), ("status.json", "3")],
)
async def test_lock_or_status_of_another_program_does_not_make_a_folder_ours(
    tmp_path: Path, name: str, content: str
) -> None:
    """A training's run folder has an empty file called lock."""
    made = settings(tmp_path)
    (made.run_dir / "conf").mkdir(parents=True)
    (made.run_dir / "conf" / "mine").touch()
    (made.run_dir / name).write_text(content)
    with pytest.raises(TorchServeFailed, match=r"would be deleted.*--run-dir"):
        await TorchServe(made).start()
    assert (made.run_dir / name).read_text() == content


@pytest.mark.parametrize("lock", [None, ""], ids=["cleaned away", "of an earlier release"])
def test_folder_whose_status_an_instance_wrote_is_taken_again(
    tmp_path: Path, lock: str | None
) -> None:
    made = settings(tmp_path)
    (made.run_dir / "conf").mkdir(parents=True)
    (made.run_dir / "conf" / "config.properties").touch()
    Supervisor(made)._write_status("stopped")
    if lock is not None:
        (made.run_dir / "lock").write_text(lock)
    server = TorchServe(made)
    server._lock_run_folder()
    assert server._lock is not None
    server._lock.close()


def test_fresh_folder_with_a_shared_folder_for_the_socket_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(tmp_path)
    (made.run_dir / "ts").mkdir(parents=True)
    monkeypatch.chdir(made.run_dir)  # a socket's path is short
    for left in (False, True):  # by an instance that was killed; the lock went with its container
        if left:
            (made.run_dir / "lock").unlink()
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind("ts/inference.sock")
        server = TorchServe(made)
        server._lock_run_folder()
        assert server._lock is not None
        server._lock.close()


def test_folder_of_an_instance_that_ended_is_taken_again(tmp_path: Path) -> None:
    made = settings(tmp_path)
    for _ in range(2):
        server = TorchServe(made)
        server._lock_run_folder()
        (made.run_dir / "conf").mkdir(exist_ok=True)
        (made.run_dir / "conf" / "config.properties").touch()
        assert server._lock is not None
        server._lock.close()


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compiling_without_a_compiler_is_refused_before_java_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, variable: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    program(tmp_path, "nvidia-smi", 'echo "GPU 0: a card"')
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    wanted = settings(tmp_path, device=device, compiled=True, compile_cache=tmp_path / "code")
    with pytest.raises(TorchServeFailed, match=f"needs a compiler.*{variable}"):
        require_tools(wanted)
    program(tmp_path, "mine", "")
    monkeypatch.setenv(variable, "mine")
    require_tools(wanted)


def test_compiling_for_a_gpu_without_pythons_header_is_refused_before_java_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    program(tmp_path, "cc", "")
    program(tmp_path, "nvidia-smi", 'echo "GPU 0: a card"')
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    wanted = settings(tmp_path, device="cuda", compiled=True, compile_cache=tmp_path / "code")
    with pytest.raises(TorchServeFailed, match=r"Python\.h is not installed"):
        require_tools(wanted)
    (tmp_path / "Python.h").touch()
    require_tools(wanted)
    require_tools(settings(tmp_path, device="cuda"))


@pytest.mark.parametrize("name", ["/proc/nowhere/code", "/proc/self"])
def test_compiling_into_a_folder_that_cannot_be_written_is_refused_before_java_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    program(tmp_path, "g++", "")
    nowhere = Path(name)
    with pytest.raises(TorchServeFailed, match=r"nothing can be written.*another --compile-cache"):
        require_tools(settings(tmp_path, device="cpu", compiled=True, compile_cache=nowhere))
    require_tools(settings(tmp_path, device="cpu", compile_cache=nowhere))


def test_gpu_that_is_not_there_is_refused_before_java_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for text in ("exit 9", "echo No devices found"):
        program(tmp_path, "nvidia-smi", text)
        with pytest.raises(TorchServeFailed, match="finds none"):
            require_tools(settings(tmp_path, device="cuda"))
    require_tools(settings(tmp_path, device="auto"))
    program(tmp_path, "nvidia-smi", 'echo "GPU 0: a card"')
    require_tools(settings(tmp_path, device="cuda"))


def parsed(folder: Path, *arguments: str) -> ServingSettings:
    (folder / "tiny.mar").touch()
    parser = argparse.ArgumentParser()
    add_serving_arguments(parser)
    given = parser.parse_args(["--model", "tiny", "--model-store", str(folder), *arguments])
    return settings_from(given, folder)


@pytest.mark.parametrize(("there", "auto"), [(False, "cpu"), (True, "cuda")])
def test_workers_and_batch_follow_the_device_unless_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, auto: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if there:
        program(tmp_path, "nvidia-smi", "")
    for arguments, device in (
        ([], auto),
        (["--device", "cpu"], "cpu"),
        (["--device", "cuda"], "cuda"),
    ):
        made, expected = parsed(tmp_path, *arguments), device_defaults(device)
        assert (made.workers, made.batch_size) == (expected["workers"], expected["batch_size"])
    given = parsed(tmp_path, "--device", "cuda", "--workers", "3", "--batch-size", "5")
    assert (given.workers, given.batch_size) == (3, 5)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        parsed(tmp_path, "--workers", "0")


@pytest.mark.parametrize(
    "damage", ["no zip", "contents", "password", "method 12", "method 14", "method 127"]
)
def test_damaged_archive_is_named_before_java_starts(tmp_path: Path, damage: str) -> None:
    made = settings(tmp_path)
    with zipfile.ZipFile(made.archive, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MAR-INF/MANIFEST.json", "{}" * 100)
    data = bytearray(made.archive.read_bytes())
    directory = int.from_bytes(data[-6:-2], "little")
    if damage == "no zip":
        data = bytearray(b"nothing")
    elif damage == "password":
        data[6] |= 1  # of the file and in the directory
        data[directory + 8] |= 1
    elif damage.startswith("method"):  # bzip2, LZMA, none that there is
        data[8] = data[directory + 10] = int(damage.split()[1])
    else:
        data[51:60] = b"\xff" * 9  # behind the name
    made.archive.write_bytes(data)
    with pytest.raises(TorchServeFailed, match=r"is damaged .*; make it again with make archive"):
        TorchServe(made)._prepare()
