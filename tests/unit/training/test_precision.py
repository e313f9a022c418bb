import logging
from pathlib import Path

import pytest

from training import precision, runs
from training.precision import has_native_bfloat16, resolve_precision


def processor(folder: Path, flags: str) -> Path:
    file = folder / "cpuinfo"
    file.write_text(f"processor : 0\nflags : fpu {flags} sse\n")
    return file


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("avx2 fma", False),
        ("avx512f avx512bw", False),
        ("avx512_bf16", True),
        ("amx_tile amx_bf16", True),
        ("asimd bf16", True),
    ],
)
def test_bfloat16_is_native_where_the_processor_names_it(
    tmp_path: Path, flags: str, native: bool
) -> None:
    assert has_native_bfloat16("cpu", processor(tmp_path, flags)) is native


def test_unknown_processor_counts_as_without_bfloat16(tmp_path: Path) -> None:
    assert has_native_bfloat16("cpu", tmp_path / "none") is False


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_the_faster_precision_and_the_run_stores_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: native)
    config = runs.make_config("glyphs", "cos_eos", preset="modern", device="cpu")
    assert config.training.precision == expected


def test_precision_asked_for_is_kept_and_emulation_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda device: False)
    with caplog.at_level(logging.WARNING):
        assert resolve_precision("bfloat16", "cpu") == "bfloat16"
    assert "emulates" in caplog.text


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of .*float16"):
        resolve_precision("float16", "cpu")
