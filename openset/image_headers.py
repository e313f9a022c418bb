"""Type and size of an upload from its first bytes, in bounded time: before any decoder walks them in Python.

Pillow reads every segment of a JPEG and every chunk of a PNG in Python, with the interpreter locked; a small file can
hold a hundred thousand. What no camera and no editor writes is refused here, before it is opened.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# An allow-list shuts out whole classes of decoder holes; MPO is what phone cameras call a JPEG with a preview behind it.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 12 * 1024 * 1024
MAX_PIXELS = 40_000_000
MAX_SIDE = 30_000

# Segments of metadata: profiles and depth maps of phones come in pieces of 64 KB, 100 are many already.
_MAX_SEGMENTS = 1_000
# Chunks of pixels: libpng writes 8 KB each, so this is a PNG of 80 MB.
_MAX_PIXEL_CHUNKS = 10_000
# Each may unpack to 1 MB. Editors write up to five.
_MAX_COMPRESSED_CHUNKS = 8
# Photoshop resources and quantization tables, which Pillow takes apart in Python.
_MAX_PARSED_BYTES = 524_288
_MAX_JUNK_BYTES = 16_384
# One segment of a JPEG holds no more: some 5,000 entries, which Pillow reads in Python. Of the values they point to it copies no
# more than this in all (since version 13).
MAX_EXIF_BYTES = 65_536

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IDAT", b"fdAT", b"fcTL")
_PNG_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")

# A scan costs time for every pixel of the image, be it 14 bytes long. Photographs have up to 10, in CMYK 18 (libjpeg's order);
# the other pictures that phones append bring a few more.
_MAX_SCANS = 100
_MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
_ARITHMETIC_WEIGHT = 3  # decoded so much slower than Huffman codes

_START_OF_SCAN = 0xDA
# With the upper byte of the length, 6 + 2 to 6 + 8: bytes alike lie by chance in a file of 12 MB, of an appended video say, once.
_SCAN_HEADER = b"\xff\xda\x00"
_FRAMES = (frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xDE}
_ARITHMETIC_FRAMES = frozenset(range(0xC9, 0xD0)) - {0xCC}
_PARSED = (0xDB, 0xED)  # DQT, APP13
_WITHOUT_LENGTH = frozenset([0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)])

Bytes = bytes | bytearray


class UnreadableImage(ValueError):
    """The bytes are not an image that we accept; the message is fit for the one who sent it."""


class ImageFacts(NamedTuple):
    """An upload as it came: size as stored, in pixels, and format."""

    width: int
    height: int
    format: str


def read_header(data: Bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Type and size of a JPEG, PNG or WebP; nothing is decoded.

    Raises:
        UnreadableImage: empty, another format, a broken or a hostile header, too large.
    """
    if not data:
        raise UnreadableImage("expected an image, got an empty body")
    try:
        if data.startswith(b"\xff\xd8\xff"):
            facts = _jpeg(data)
        elif data.startswith(_PNG):
            facts = _png(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            facts = _webp(data)
        else:
            raise UnreadableImage(
                f"expected an image of type {', '.join(FORMATS)}, got something else"
            )
    except (IndexError, struct.error) as error:
        raise UnreadableImage("the image header is broken: it ends too early") from error
    width, height = facts.width, facts.height
    if width * height > max_pixels or max(width, height) > MAX_SIDE or not width * height:
        raise UnreadableImage(
            f"the image is {width}x{height}; at least one pixel, at most {max_pixels} pixels and {MAX_SIDE} a side "
            "are accepted"
        )
    return facts


def _png(data: Bytes) -> ImageFacts:
    if data[8:16] != b"\0\0\0\rIHDR":
        raise UnreadableImage("the image header is broken: a PNG begins with IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    chunks = pixel_chunks = compressed = 0
    at, end = 33, len(data)
    while at + 8 <= end:
        kind = data[at + 4 : at + 8]
        if kind == b"IEND":
            break
        if kind in _PNG_PIXELS:
            pixel_chunks += 1
        else:
            chunks += 1
            compressed += kind in _PNG_COMPRESSED
        if (
            chunks > _MAX_SEGMENTS
            or pixel_chunks > _MAX_PIXEL_CHUNKS
            or compressed > _MAX_COMPRESSED_CHUNKS
        ):
            raise UnreadableImage(
                f"the PNG has too many chunks; at most {_MAX_SEGMENTS} of metadata, {_MAX_COMPRESSED_CHUNKS} of them "
                f"compressed, and {_MAX_PIXEL_CHUNKS} of pixels are accepted"
            )
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return ImageFacts(width, height, "PNG")


def _jpeg(data: Bytes) -> ImageFacts:
    """Walk the segments up to the first scan, as Pillow does; count the scans that libjpeg finds behind it."""
    facts: ImageFacts | None = None
    weight = 1
    segments = parsed = exif = junk = 0
    at = 2
    while True:
        marker_at = data.find(b"\xff", at)
        if marker_at < 0:
            raise IndexError
        junk += marker_at - at
        marker = data[marker_at + 1]
        if marker in (0xFF, 0x00):  # padding; an escaped byte
            junk += 1
            at = marker_at + 1 + (marker == 0x00)
        elif marker == _START_OF_SCAN:
            break
        else:
            segments += 1
            at = marker_at + 2
            if marker not in _WITHOUT_LENGTH:
                length = int.from_bytes(data[at : at + 2], "big")
                if length < 2:
                    raise UnreadableImage("the image header is broken: a segment has no length")
                if marker in _FRAMES:
                    if facts is not None or length != 8 + 3 * data[at + 7]:
                        raise UnreadableImage(
                            "the image header is broken: its frame is not what a JPEG has"
                        )
                    height, width = struct.unpack_from(">HH", data, at + 3)
                    facts = ImageFacts(width, height, "JPEG")
                    weight = _ARITHMETIC_WEIGHT if marker in _ARITHMETIC_FRAMES else 1
                parsed += length * (marker in _PARSED)
                exif += length * data.startswith(b"Exif\0\0", at + 2)
                at += length
        if (
            segments > _MAX_SEGMENTS
            or parsed > _MAX_PARSED_BYTES
            or exif > MAX_EXIF_BYTES
            or junk > _MAX_JUNK_BYTES
        ):
            raise UnreadableImage(
                f"the JPEG has too much before its pixels; at most {_MAX_SEGMENTS} segments are accepted, among them "
                f"{MAX_EXIF_BYTES} bytes of EXIF data and {_MAX_PARSED_BYTES} of tables and image resources"
            )
    if facts is None:
        raise UnreadableImage("the image header is broken: there is no frame")
    scans = data.count(_SCAN_HEADER, marker_at)
    pixels = min(facts.width * facts.height, MAX_PIXELS)  # a larger image is refused for its size
    if scans > _MAX_SCANS or scans * weight * pixels > _MAX_SCANNED_PIXELS:
        raise UnreadableImage(
            f"the JPEG has {scans} scans of {facts.width}x{facts.height} pixels; at most {_MAX_SCANS} scans, and "
            f"{_MAX_SCANNED_PIXELS // weight} pixels in all of them, are accepted"
        )
    return facts


def _webp(data: Bytes) -> ImageFacts:
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        if len(data) < 30:
            raise IndexError
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise UnreadableImage("the image header is broken: a WebP begins with VP8, VP8L or VP8X")
    return ImageFacts(width, height, "WEBP")
