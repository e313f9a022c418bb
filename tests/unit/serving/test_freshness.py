"""What is packed or served although its run holds something newer is named, with the command."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serving import archive as archive_module
from serving import serve, stack
from serving.configuration import ServingSettings
from serving.freshness import why_archive_is_stale
from tests.factories import tiny_card
from tests.stub_torchserve import small_archive


def exported(run: Path, checkpoint: bytes = b"first epoch", **changes: object) -> Path:
    """A run's folder as far as it matters here: a checkpoint, and an artifact whose card names it."""
    artifact = run / "artifact"
    artifact.mkdir(parents=True, exist_ok=True)
    (run / "last.pt").write_bytes(checkpoint)
    facts = {
        "run": run.name,
        "checkpoint": "last",
        "checkpoint_sha256": hashlib.sha256(checkpoint).hexdigest(),
    }
    (artifact / "model_card.json").write_text(tiny_card(training=facts, **changes).to_json())
    (artifact / "calibration.npz").write_bytes(b"scores")
    (artifact / "weights.safetensors").write_bytes(b"weights")
    return artifact


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return small_archive(exported(tmp_path / "dogs"), tmp_path / "dogs.mar")


def test_archive_of_an_unchanged_run_is_fresh(packed: Path, tmp_path: Path) -> None:
    assert why_archive_is_stale(packed, runs=tmp_path) is None


def test_archive_is_stale_after_more_training(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "dogs"
    (run / "last.pt").write_bytes(b"second epoch")
    told = why_archive_is_stale(packed, runs=tmp_path)
    assert told is not None
    assert f"make export RUN={run} && make archive RUN={run}" in told
    exported(run, b"second epoch")
    told = why_archive_is_stale(packed, runs=tmp_path)
    assert told is not None
    assert "make export" not in told
    assert told.endswith(f"make archive RUN={run}")


@pytest.mark.parametrize("what", ["card", "scores"])
def test_archive_is_stale_after_a_new_export_or_calibration(
    packed: Path, tmp_path: Path, what: str
) -> None:
    if what == "card":
        exported(tmp_path / "dogs", factory={"fpr": 0.1})
    else:
        (tmp_path / "dogs" / "artifact" / "calibration.npz").write_bytes(b"scores of two paths")
    told = why_archive_is_stale(packed, runs=tmp_path)
    assert told is not None
    assert told.endswith(f"make archive RUN={tmp_path / 'dogs'}")


def test_name_of_the_archive_is_no_difference_and_stands_in_the_command(
    packed: Path, tmp_path: Path
) -> None:
    renamed = packed.rename(tmp_path / "cats.mar")
    exported(tmp_path / "dogs", name="cats")
    assert why_archive_is_stale(renamed, runs=tmp_path) is None
    (tmp_path / "dogs" / "last.pt").write_bytes(b"second epoch")
    assert str(why_archive_is_stale(renamed, runs=tmp_path)).endswith("NAME=cats")


def test_archive_whose_run_is_elsewhere_or_unnamed_is_not_judged(
    packed: Path, tmp_path: Path
) -> None:
    assert why_archive_is_stale(packed, runs=tmp_path / "elsewhere") is None
    artifact = exported(tmp_path / "old")
    (artifact / "model_card.json").write_text(tiny_card().to_json())
    assert why_archive_is_stale(small_archive(artifact, tmp_path / "o.mar"), runs=tmp_path) is None


def test_make_archive_warns_in_one_line_and_packs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = exported(tmp_path / "dogs")
    monkeypatch.setattr(
        archive_module, "build_archive", lambda artifact, *_: artifact / "calibration.npz"
    )
    assert archive_module.main(["--artifact", str(artifact), "--name", "dogs"]) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "dogs" / "last.pt").write_bytes(b"second epoch")
    assert archive_module.main(["--artifact", str(artifact), "--name", "dogs"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "make export RUN=" in line


def test_make_archive_packs_also_where_the_checkpoint_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = exported(tmp_path / "dogs")
    monkeypatch.setattr(
        archive_module, "build_archive", lambda artifact, *_: artifact / "calibration.npz"
    )
    refuse_to_open(monkeypatch, tmp_path / "dogs" / "last.pt")
    assert archive_module.main(["--artifact", str(artifact), "--name", "dogs"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: whether {artifact} is older than its run cannot be told")
    assert said.out.startswith("archived: ")


@pytest.mark.parametrize(("module", "runner"), [(serve, "serve"), (stack, "run_stack")])
def test_serving_a_stale_archive_warns_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: ModuleType,
    runner: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    exported(Path("runs/dogs"))
    Path("model_store").mkdir()
    small_archive(Path("runs/dogs/artifact"), Path("model_store/dogs.mar"))

    async def served(*_: object) -> int:
        return 0

    monkeypatch.setattr(module, runner, served)
    assert module.main(["--model", "dogs"]) == 0
    assert not caplog.records
    Path("runs/dogs/last.pt").write_bytes(b"second epoch")
    assert module.main(["--model", "dogs"]) == 0
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "make export RUN=runs/dogs && make archive RUN=runs/dogs" in record.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("artifact/model_card.json", b"{"),
        ("artifact/model_card.json", b"\xff"),
        ("artifact/model_card.json", json.dumps({"schema": 0}).encode()),
        # Whole but for one field, which holds what no card of ours does.
        ("artifact/model_card.json", tiny_card(training=["a", "list"]).to_json().encode()),  # type: ignore[arg-type]
        ("artifact/model_card.json", b"[" * 100_000),
        ("last.pt", None),
        ("artifact/calibration.npz", None),
    ],
    ids=["not JSON", "not text", "other schema", "other types", "too deep", "checkpoint", "scores"],
)
@pytest.mark.parametrize(("module", "runner"), [(serve, "serve"), (stack, "run_stack")])
def test_run_that_cannot_be_read_stops_no_archive_from_being_served(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: ModuleType,
    runner: str,
    name: str,
    content: bytes | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    exported(Path("runs/dogs"))
    Path("model_store").mkdir()
    small_archive(Path("runs/dogs/artifact"), Path("model_store/dogs.mar"))
    file = Path("runs/dogs", name)
    if content is None:
        refuse_to_open(monkeypatch, file)
    else:
        file.write_bytes(content)
        Path("runs/dogs/last.pt").write_bytes(b"second epoch")  # the artifact is asked too

    async def served(*_: object) -> int:
        return 0

    monkeypatch.setattr(module, runner, served)
    assert module.main(["--model", "dogs"]) == 0
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "whether model_store/dogs.mar is older than its run cannot be told" in record.message


def test_damaged_archive_stops_no_advice(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = rb"(PK\x01\x02.{6}).."  # of each member, in the directory
    packed.write_bytes(re.sub(method, b"\\1\xff\xff", packed.read_bytes(), flags=re.DOTALL))
    folder = packed.parent
    serve.tell_if_stale(ServingSettings(model="dogs", model_store=folder, run_dir=folder / "run"))
    [record] = caplog.records
    assert f"whether {packed} is older than its run cannot be told" in record.message


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """As another user's file does, also to root."""
    working = Path.open

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return working(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
