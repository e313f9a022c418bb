"""Type and size by hand: equal to Pillow's on sound images, a quick refusal on hostile ones."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openset.image_headers import ImageFacts, UnreadableImage, read_header
from tests.hostile_images import (
    HOSTILE,
    jpeg_segment,
    jpeg_with,
    png_chunk,
    png_with,
    progressive_jpeg,
    with_more_scans,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 41, 4), dtype=np.uint8)


def encoded(mode: str, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


SOUND = {
    "png": encoded("RGBA", "PNG"),
    "grey png": encoded("L", "PNG"),
    "animated png": encoded("RGB", "PNG", save_all=True, append_images=[Image.new("RGB", (41, 23))]),
    "jpeg": encoded("RGB", "JPEG"),
    "progressive jpeg": encoded("RGB", "JPEG", progressive=True),
    "cmyk jpeg": encoded("CMYK", "JPEG"),
    "jpeg with profile, EXIF and remark": encoded(
        "RGB", "JPEG", icc_profile=bytes(300_000), exif=b"Exif\0\0" + bytes(60_000), comment=b"x" * 60_000
    ),
    "progressive cmyk jpeg": encoded("CMYK", "JPEG", progressive=True),
    "jpeg with a video behind": encoded("RGB", "JPEG") + b"\xff\xda" * 2_000,
    "mpo": encoded("RGB", "MPO", save_all=True, append_images=[Image.new("RGB", (10, 10))]),
    "webp": encoded("RGB", "WEBP"),
    "lossless webp": encoded("RGB", "WEBP", lossless=True),
    "transparent webp": encoded("RGBA", "WEBP", exif=b"Exif\0\0" + bytes(100)),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_type_and_size_are_those_that_pillow_finds(name: str) -> None:
    with Image.open(io.BytesIO(SOUND[name])) as opened:
        kind = "JPEG" if opened.format == "MPO" else opened.format
        assert read_header(SOUND[name]) == ImageFacts(*opened.size, str(kind)) == (41, 23, kind)
    assert read_header(bytearray(SOUND[name])) == read_header(SOUND[name])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused_before_a_decoder_sees_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openset.preprocessing import Preprocessing

    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UnreadableImage):
        Preprocessing(mode="L", image_size=28, resize=28).decode(HOSTILE[name])


def test_the_large_metadata_of_cameras_and_editors_pass() -> None:
    depth_map = jpeg_segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000)) * 60
    assert read_header(jpeg_with(depth_map)).format == "JPEG"
    assert read_header(png_with(png_chunk(b"IDAT", bytes(8192)) * 1_500)).format == "PNG"
    assert read_header(png_with(png_chunk(b"tEXt", b"a\0b") * 100)).format == "PNG"


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_progressive_photographs_pass_up_to_the_largest_size(mode: str) -> None:
    assert read_header(progressive_jpeg(mode, (8_000, 5_000))) == (8_000, 5_000, "JPEG")


def test_small_progressive_jpegs_may_have_a_scan_for_every_bit() -> None:
    data = with_more_scans(progressive_jpeg(size=(1_000, 1_000)), 90)
    assert read_header(data).format == read_header(bytearray(data)).format == "JPEG"


@pytest.mark.parametrize("name", SOUND)
def test_every_cut_of_a_header_is_one_clear_error_or_the_true_size(name: str) -> None:
    for length in range(64):
        with contextlib.suppress(UnreadableImage):
            assert read_header(SOUND[name][:length])[:2] == (41, 23)


def test_size_beyond_the_limit_is_refused_by_the_header_alone() -> None:
    with pytest.raises(UnreadableImage, match="41x23; at least one pixel, at most 900 pixels"):
        read_header(SOUND["png"], max_pixels=900)
