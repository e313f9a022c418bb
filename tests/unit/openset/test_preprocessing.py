"""Any upload is judged the way the model was taught."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torchvision import transforms

import openset.preprocessing
from openset.image_headers import UnreadableImage
from openset.preprocessing import MAX_EXIF_BYTES, Preprocessing
from tests.factories import grey_image, image_bytes
from tests.hostile_images import png_chunk

GREY = Preprocessing(mode="L", image_size=28, resize=28)
COLOR = Preprocessing(mode="RGB", image_size=224, resize=256)


def color_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "size", [(301, 200), (500, 375), (64, 64), (77, 133), (57, 50), (224, 224), (256, 256)]
)
def test_transform_equals_torchvisions_resize_and_center_crop(size: tuple[int, int]) -> None:
    image = color_image(*size)
    reference = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    assert torch.equal(COLOR.transform(image), reference(image))


def test_bytes_and_arrays_take_the_same_path() -> None:
    array = grey_image()
    from_bytes = GREY.transform(GREY.decode(image_bytes(array)))
    assert torch.equal(from_bytes, GREY.from_array(array))
    assert torch.equal(from_bytes[0], torch.from_numpy(array))


def test_exif_orientation_is_applied() -> None:
    image = color_image(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert COLOR.decode(encoded(image, "PNG", exif=exif)).size == (20, 40)


def as_text(exif: bytes) -> bytes:
    """The chunk that ImageMagick writes."""
    digits = exif.hex()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    text = "\n".join(["", "exif", f"{len(exif):8}", *lines, ""])
    return png_chunk(b"tEXt", b"Raw profile type exif\0" + text.encode())


@pytest.mark.parametrize("at", [33, -12], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("form", ["chunk", "text"])
def test_orientation_of_a_png_is_applied_wherever_it_stands(form: str, at: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data, content = encoded(color_image(40, 20)), exif.tobytes()
    chunk = as_text(content) if form == "text" else png_chunk(b"eXIf", content[6:])
    assert COLOR.decode(data[:at] + chunk + data[at:]).size == (20, 40)


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (30, 30), (10, 20, 30, 0))
    assert GREY.decode(encoded(clear)).getpixel((5, 5)) == 255
    palette = Image.new("P", (30, 30), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert COLOR.decode(encoded(palette, transparency=0)).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "fill", "grey"),
    [
        ("1", 1, 255),
        ("L", 100, 100),
        ("LA", (100, 255), 100),
        ("P", 100, 100),
        ("RGB", (100, 100, 100), 100),
        ("RGBA", (100, 100, 100, 255), 100),
        ("RGBA", (100, 100, 100, 0), 255),
        ("CMYK", (0, 0, 0, 155), 100),
        ("I;16", 100 << 8, 100),
    ],
)
def test_every_stored_mode_keeps_its_brightness(mode: str, fill: Any, grey: int) -> None:
    image = Image.new("L" if mode == "P" else mode, (40, 30), fill).convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    for preprocessing, channels in ((GREY, 1), (COLOR, 3)):
        tensor = preprocessing.transform(preprocessing.decode(data))
        assert tensor.dtype == torch.uint8
        assert tensor.shape[0] == channels
        assert (tensor.int() - grey).abs().max() <= (3 if mode == "CMYK" else 0)


def test_sixteen_bit_grey_keeps_its_upper_byte_with_and_without_a_transparent_value() -> None:
    image = Image.fromarray(np.full((30, 30), 0x1000, np.uint16))
    assert GREY.decode(encoded(image)).getpixel((0, 0)) == 0x10
    assert GREY.decode(encoded(image, transparency=0x1001)).getpixel((0, 0)) == 0x10
    assert GREY.decode(encoded(image, transparency=0x1000)).getpixel((0, 0)) == 0xFF


def test_every_sixteen_bit_value_becomes_its_upper_byte() -> None:
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    decoded = np.asarray(GREY.decode(encoded(Image.fromarray(values))))
    np.testing.assert_array_equal(decoded, values // 256)


def test_strips_of_a_large_transparent_image_join_seamlessly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (31, 17, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels, "RGBA"))
    whole = np.asarray(COLOR.decode(data))
    monkeypatch.setattr(openset.preprocessing, "_STRIP_PIXELS", 50)
    np.testing.assert_array_equal(np.asarray(COLOR.decode(data)), whole)


def _png_claiming(width: int, height: int) -> bytes:
    data = bytearray(image_bytes())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"not an image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF89a" + b"\0" * 50,
        image_bytes()[:60],
        image_bytes(format="JPEG")[:200],
        _png_claiming(60_000, 60_000),
        _png_claiming(12_000, 12_000),
        _png_claiming(1, 65_535),
        _png_claiming(0, 10),
    ],
    ids=[
        "empty",
        "byte",
        "text",
        "svg",
        "gif",
        "png-cut",
        "jpeg-cut",
        "bomb",
        "144MP",
        "long",
        "zero",
    ],
)
def test_bad_input_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(UnreadableImage) as caught:
        COLOR.decode(data)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("at", [33, -12], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize(
    "chunk", [png_chunk(b"eXIf", bytes(70_000)), as_text(bytes(70_000))], ids=["chunk", "text"]
)
def test_more_exif_data_than_a_camera_writes_is_refused_before_it_is_read(
    chunk: bytes, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda _: pytest.fail("read"))
    data = encoded(color_image(20, 20))
    with pytest.raises(
        UnreadableImage, match=r"^the image has more than 65536 bytes of EXIF data$"
    ):
        COLOR.decode(data[:at] + chunk + data[at:])


@pytest.mark.parametrize("size", [MAX_EXIF_BYTES, MAX_EXIF_BYTES + 1])
@pytest.mark.parametrize("form", ["chunk", "text"])
def test_bound_of_exif_data_counts_its_bytes_in_either_form(form: str, size: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().ljust(size, b"\0")
    chunk = as_text(content) if form == "text" else png_chunk(b"eXIf", content[6:])
    data = encoded(color_image(40, 20))
    data = data[:33] + chunk + data[33:]
    if size > MAX_EXIF_BYTES:
        with pytest.raises(UnreadableImage, match="65536 bytes of EXIF data"):
            COLOR.decode(data)
    else:
        assert COLOR.decode(data).size == (20, 40)


@pytest.mark.parametrize("step", ["open", "load", "exif_transpose"])
def test_memory_that_runs_out_is_not_the_images_fault(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(color_image(20, 20))
    owner = {"open": Image, "load": ImageFile.ImageFile, "exif_transpose": ImageOps}[step]

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(MemoryError):
        COLOR.decode(data)


@pytest.mark.parametrize("part", range(1, 16))
def test_jpeg_cut_at_every_sixteenth_never_yields_a_picture(part: int) -> None:
    data = encoded(color_image(160, 120), "JPEG")
    with pytest.raises(UnreadableImage):
        COLOR.decode(data[: len(data) * part // 16])


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 500)])
def test_extreme_shapes_become_a_square_without_huge_intermediates(size: tuple[int, int]) -> None:
    assert COLOR.transform(color_image(*size)).shape == (3, 224, 224)


def test_facts_are_of_the_upload_as_it_was_stored() -> None:
    image, facts = COLOR.decode_with_facts(bytearray(encoded(color_image(123, 45), "JPEG")))
    assert facts == (123, 45, "JPEG")
    assert image.size == (123, 45)


def test_normalize_scales_and_standardizes() -> None:
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    assert COLOR.normalize(images).unique().tolist() == [1.0]
    standardized = Preprocessing(
        mode="RGB", image_size=8, resize=8, mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 1.0)
    )
    assert standardized.normalize(images)[0, :, 0, 0].tolist() == [1.0, 2.0, 1.0]


def test_settings_survive_the_model_card() -> None:
    preprocessing = Preprocessing(
        mode="RGB", image_size=8, resize=9, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    import json

    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_identity_changes_with_every_setting_and_names_the_decoder() -> None:
    assert GREY.identity() != Preprocessing(mode="L", image_size=28, resize=32).identity()
    assert "pillow-" in GREY.identity()


def test_opening_a_broken_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImage, match=r"broken\.png"):
        GREY.open(tmp_path / "broken.png")
