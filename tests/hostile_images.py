"""Small files that cost a decoder seconds: each is a sound image with too much around its pixels."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from tests.factories import image_bytes

_PNG, _JPEG = image_bytes(), image_bytes(format="JPEG")


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    """A chunk with its length and checksum."""
    return (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )  # fmt: skip


def png_with(chunks: bytes) -> bytes:
    """A PNG with these chunks behind its IHDR."""
    return _PNG[:33] + chunks + _PNG[33:]


def jpeg_segment(marker: int, content: bytes = b"") -> bytes:
    """A segment with its length."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(segments: bytes) -> bytes:
    """A JPEG with these segments behind its JFIF header."""
    return _JPEG[:20] + segments + _JPEG[20:]


def progressive_jpeg(mode: str = "L", size: tuple[int, int] | None = None) -> bytes:
    """A progressive JPEG of one color; where ``size`` is given, it is what its frame claims."""
    stream = io.BytesIO()
    Image.new(mode, (28, 28)).save(stream, "JPEG", progressive=True)
    data = bytearray(stream.getvalue())
    if size is not None:
        struct.pack_into(">HH", data, data.index(b"\xff\xc2") + 5, size[1], size[0])
    return bytes(data)


def with_more_scans(jpeg: bytes, count: int) -> bytes:
    """The last scan, a few bytes, ``count`` times more."""
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * count + jpeg[-2:]


_RESOURCES = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\0" * 5_400

HOSTILE = {
    "png of unpacked text": png_with(
        png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)) * 60
    ),
    "png of unknown chunks": png_with(png_chunk(b"abCd") * 30_000),
    "png with chunks behind": _PNG[:-12] + png_chunk(b"abCd") * 30_000 + _PNG[-12:],
    "png of tiny pixel chunks": png_with(png_chunk(b"IDAT") * 30_000),
    "jpeg of empty segments": jpeg_with(jpeg_segment(0xFE) * 100_000),
    "jpeg of markers alone": jpeg_with(b"\xff\xd0" * 100_000),
    "jpeg of image resources": jpeg_with(jpeg_segment(0xED, _RESOURCES) * 20),
    "jpeg of tables": jpeg_with(jpeg_segment(0xDB, bytes(65) * 1_000) * 20),
    "jpeg of EXIF data": jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 20),
    "jpeg of junk": jpeg_with(bytes(1_000_000)),
    "jpeg of escaped bytes": jpeg_with(b"\xff\x00" * 100_000),
    "jpeg of two frames": jpeg_with(
        jpeg_segment(0xC0, b"\x08\0\x1c\0\x1c\x01\x01\x11\0")
    ),
    "jpeg of scans": with_more_scans(progressive_jpeg(), 199),
    "large jpeg of fewer scans": with_more_scans(progressive_jpeg(size=(6_000, 6_000)), 60),
    "large jpeg of arithmetic scans": with_more_scans(
        progressive_jpeg(size=(6_000, 6_000)).replace(b"\xff\xc2", b"\xff\xca"), 4
    ),
}  # fmt: skip
