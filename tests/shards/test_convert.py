"""Bytes stay as they are unless something has to change, and then only that changes."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mae_dist.errors import UserError
from mae_dist.shards.convert import Conversion, convert

RNG = np.random.default_rng(0)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = Image.fromarray(RNG.integers(0, 256, (5, 5, 4), dtype=np.uint8), "RGBA")
    return (
        coarse.resize((width, height), Image.Resampling.BICUBIC).convert("RGB" if mode == "P" else "RGBA").convert(mode)
    )


def encode(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize(
    "how", [{}, {"exif_rotate": True}, {"resize": "shortest:30"}, {"resize": "only-if-bigger:30"}, {"quality": 10}]
)
@pytest.mark.parametrize(("form", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpg")])
def test_what_needs_no_change_keeps_its_bytes(how, form, suffix):
    options = {"save_all": True, "append_images": [picture(40, 30)]} if form == "MPO" else {}
    data = encode(picture(40, 30), form, **options)
    assert decode(data).format == form
    assert convert(data, Conversion(**how)) == (data, suffix)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.sampled_from(["shortest", "only-if-bigger"]))
def test_the_shorter_side_is_what_was_asked_for(width, height, side, kind):
    new_width, new_height = Conversion(f"{kind}:{side}").size(width, height)
    if kind == "only-if-bigger" and min(width, height) < side:
        assert (new_width, new_height) == (width, height)
        return
    scale = side / min(width, height)
    assert min(new_width, new_height) == side
    assert abs(new_width - width * scale) <= 0.5 and abs(new_height - height * scale) <= 0.5


@pytest.mark.parametrize(("form", "least"), [("JPEG", 35), ("PNG", 99), ("WEBP", 30)])
def test_resizing_is_pils_antialiased_bicubic_and_keeps_the_format(form, least):
    data = encode(picture(200, 120), form)
    small, _ = convert(data, Conversion("shortest:60"))
    expected = decode(data).convert("RGB").resize((100, 60), Image.Resampling.BICUBIC)
    assert decode(small).format == form and decode(small).size == (100, 60)
    assert psnr(decode(small), expected) >= least
    worse, _ = convert(data, Conversion("shortest:60", quality=20))
    assert len(worse) < len(small) or form == "PNG"


@pytest.mark.parametrize("mode", ["L", "RGBA", "1", "P", "LA"])
def test_resizing_keeps_grey_and_transparency(mode):
    small, _ = convert(encode(picture(80, 60, mode), "PNG"), Conversion("shortest:30"))
    assert decode(small).mode == {"1": "L", "P": "RGB", "LA": "RGBA"}.get(mode, mode)
    assert decode(small).size == (40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_request_only_and_never_twice(orientation):
    image = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "JPEG", exif=exif, quality=95)
    assert convert(data, Conversion()) == (data, "jpg")
    turned, _ = convert(data, Conversion(exif_rotate=True))
    upright = ImageOps.exif_transpose(decode(data))
    assert decode(turned).size == upright.size
    assert psnr(decode(turned), upright) > 28
    assert decode(turned).getexif().get(0x0112, 1) == 1
    small, _ = convert(data, Conversion("shortest:15"))  # the loader ignores EXIF: so does resizing
    assert decode(small).size == (20, 15)
    assert decode(small).getexif().get(0x0112, 1) == 1


def test_a_cmyk_jpeg_becomes_an_rgb_jpeg_of_the_same_picture():
    data = encode(picture(40, 30, "CMYK"), "JPEG", quality=95)
    repaired, suffix = convert(data, Conversion())
    assert suffix == "jpg" and decode(repaired).mode == "RGB"
    assert psnr(decode(repaired), decode(data)) > 28


GREY = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)


def grey_12_bit_tiff() -> bytes:
    """PIL writes none: two pixels in three bytes, and the same ramp."""
    data = encode(Image.fromarray(GREY), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        start = image.tag_v2[273][0]
    high, low = (GREY.reshape(-1, 2) >> 4).astype(np.uint32).T
    packed = (high << 12 | low).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    entry = struct.pack("<HHI", 258, 3, 1)
    assert data.count(entry) == 1
    at = data.index(entry) + 8
    data = data[:at] + b"\x0c" + data[at + 1 :]
    return data[:start] + packed + data[start + len(packed) :]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "TIFF big-endian", "TIFF 12 bits"])
def test_grey_of_16_bits_becomes_8_and_not_white(form):
    if form == "TIFF big-endian":
        data = encode(Image.frombytes("I;16B", (40, 30), GREY.astype(">u2").tobytes()), "TIFF")
    else:
        data = grey_12_bit_tiff() if form == "TIFF 12 bits" else encode(Image.fromarray(GREY), form)
    stored, suffix = convert(data, Conversion())
    assert suffix == "png" and decode(stored).mode == "L"
    np.testing.assert_array_equal(np.asarray(decode(stored)), GREY >> 8)
    small, _ = convert(data, Conversion("shortest:15", exif_rotate=True))
    assert decode(small).mode == "L" and decode(small).size == (20, 15)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_bad(kind):
    with pytest.raises(ValueError, match="no saying which value is white; save it with 8 or 16 bits, unsigned"):
        convert(encode(Image.fromarray(GREY.astype(kind)), "TIFF"), Conversion())


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"GIF89a", lambda d: d[2:]])
def test_what_is_no_image_raises(damage):
    with pytest.raises((OSError, ValueError, SyntaxError)):
        convert(damage(encode(picture(100, 100), "JPEG")), Conversion())


@pytest.mark.parametrize(("form", "side"), [("JPEG", 65500), ("WEBP", 16383)])
def test_what_a_format_cannot_hold_is_said(form, side):
    with pytest.raises(ValueError, match=rf"resized, it has 256 x 76800 pixels, and a {form} has {side} at most"):
        convert(encode(picture(1, 300), form), Conversion("shortest:256"))


def test_a_decompression_bomb_is_refused_from_its_header():
    data = bytearray(encode(picture(8, 8), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # claims 65535 x 65535 pixels
    with pytest.raises(ValueError, match=r"65535 x 65535 pixels, more than data.max_pixels"):
        convert(bytes(data), Conversion())


@pytest.mark.parametrize("resize", ["256", "shortest", "shortest:-1", "longest:3", "none:3", "shortest:1.5"])
def test_a_resize_that_means_nothing_is_a_user_error(resize):
    with pytest.raises(UserError, match="write none, shortest:256 or only-if-bigger:512"):
        Conversion(resize)
