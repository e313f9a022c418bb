"""Decoders side by side: every one has a row, and one that is missing says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import decoders
from benchmarks.serving.models import photographs


def test_every_decoder_has_a_row_and_a_missing_one_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes, preprocessing: object) -> None:
        raise RuntimeError("no such library\nand more")

    broken_decoder = decoders.Decoder(broken, decoders._itself)
    monkeypatch.setattr(decoders, "DECODERS", {**decoders.DECODERS, "broken": broken_decoder})
    monkeypatch.setattr(decoders, "photographs", lambda folder, count: photographs(folder, 2))
    file = tmp_path / "new" / "decoders.json"
    assert decoders.main(["--passes", "1", "--json", str(file)]) == 0
    rows = {row["decoder"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == list(decoders.DECODERS)
    assert rows["broken"]["missing"] == "failed: no such library"
    for row in rows.values():
        assert (row["missing"] is None) == (row["decode_ms"] is not None)
    assert rows["Pillow"]["pixel_max"] == 0
    assert "2 images" in capsys.readouterr().out


def test_decoders_take_turns_at_every_image() -> None:
    seen: list[tuple[str, bytes]] = []
    works = {name: lambda data, n=name: seen.append((n, data)) for name in "ab"}
    decoders.fastest_ms(works, [b"1", b"2"], passes=1)
    assert seen == [("a", b"1"), ("b", b"1"), ("a", b"2"), ("b", b"2")]


def test_unwritable_json_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(decoders, "compare", lambda *_: [])
    assert decoders.main(["--json", str(tmp_path / "file" / "x.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_grey_photographs_are_counted_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, mode in enumerate(("RGB", "L", "RGB")):
        Image.new(mode, (8, 8)).save(tmp_path / f"{number}.jpg")
    assert len(photographs(tmp_path, 64)) == 2
    assert "2 of the first 3 photographs are used" in capsys.readouterr().err
