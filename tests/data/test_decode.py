"""Pixels: strict JPEG, PIL as the word that counts, no image invented from broken bytes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mae_dist.data import DataConfig
from mae_dist.data.augment import finish, random_views
from mae_dist.data.decode import decode
from mae_dist.data.turbojpeg import LIBRARY, library
from mae_dist.errors import UserError
from tests.conftest import has_turbojpeg

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(PIXELS).resize((40, 30), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_is_what_pil_says(options):
    data = encode(SMOOTH, "JPEG", **options)
    reference = np.array(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(decode(data).astype(int) - reference).max() <= 2


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_formats_and_channels(form, channels):
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = decode(encode(SMOOTH, form, **options), channels)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    np.testing.assert_array_equal(pixels, np.array(SMOOTH.convert(mode)).reshape(30, 40, channels))


def test_grey_and_cmyk_jpegs():
    assert decode(encode(SMOOTH.convert("L"), "JPEG")).shape == (30, 40, 3)
    assert decode(encode(SMOOTH, "JPEG"), 1).shape == (30, 40, 1)
    assert decode(encode(SMOOTH.convert("CMYK"), "JPEG")).shape == (30, 40, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_not_clipped_to_white(form, channels):
    deep = np.arange(0, 2**16, 2**6, dtype=np.uint16).reshape(32, 32)
    pixels = decode(encode(Image.fromarray(deep), form), channels)
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8)[..., None], channels, axis=2))


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.95])
def test_truncated_data_raises(keep):
    data = encode(SMOOTH, "JPEG")
    cut = data[: int(keep * len(data)) if isinstance(keep, float) else keep]
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode(cut)


def test_a_chosen_box_is_cut_out_of_the_same_pixels():
    box = (3, 5, 20, 30)
    for form in ("JPEG", "PNG"):
        data = encode(SMOOTH, form)
        for decoder in ("fast", "pil"):
            found = decode(data, 3, lambda height, width: box, decoder)
            np.testing.assert_array_equal(found, decode(data, decoder=decoder)[3:23, 5:35])


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says it is huge."""
    data = bytearray(encode(SMOOTH, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("bomb", [bomb_png(60000, 50000), bomb_jpeg(60000, 50000), bomb_jpeg(65500, 2000)])
@pytest.mark.parametrize("decoder", ["fast", "pil"])
def test_a_bomb_is_refused_from_its_header(bomb, decoder, monkeypatch):
    for name in ("numpy.array", "simplejpeg.decode_jpeg"):  # what would hold its pixels
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises((ValueError, Image.DecompressionBombError), match=r"more than data.max_pixels|exceeds limit"):
        decode(bomb, decoder=decoder)


def test_max_pixels_is_the_users():
    for form in ("JPEG", "PNG"):
        data = encode(SMOOTH, form)
        assert decode(data, max_pixels=1200).shape == (30, 40, 3)
        with pytest.raises(ValueError, match=r"40 x 30 pixels, more than data.max_pixels 1199"):
            decode(data, max_pixels=1199)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pil_is_the_official_loader_to_the_bit(form):
    """torchvision's own functions on a PIL image, with our boxes and flips."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as official

    image = Image.fromarray(PIXELS).resize((120, 90), Image.Resampling.BICUBIC)
    data, config, flips = encode(image, form), DataConfig(decoder="pil"), 0
    for view in random_views(np.zeros(20), np.arange(20), config, 0):
        ours = finish(decode(data, 3, view.choose, "pil"), view, (32, 32), config)
        opened = Image.open(io.BytesIO(data)).convert("RGB")
        theirs = official.resized_crop(opened, *view.choose(90, 120), [32, 32], InterpolationMode.BICUBIC)
        theirs = official.hflip(theirs) if view.flip else theirs
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.array(theirs))
        flips += view.flip
    assert 0 < flips < 20


@pytest.mark.skipif(not has_turbojpeg(), reason=f"no TurboJPEG >= 3 here; {LIBRARY} may point to one")
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}, {"grey": True}]
)
def test_region_is_fast_to_the_bit(options):
    options = dict(options)
    noise = np.random.default_rng(1).integers(0, 256, (40, 55, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((331, 247), Image.Resampling.BICUBIC)
    data = encode(image.convert("L") if options.pop("grey", False) else image, "JPEG", **options)
    for view in random_views(np.zeros(60), np.arange(60), DataConfig(crop_scale=(0.001, 1.0)), 0):
        for channels in (1, 3):
            fast, region = (decode(data, channels, view.choose, decoder) for decoder in ("fast", "region"))
            np.testing.assert_array_equal(region, fast)


@pytest.mark.skipif(not has_turbojpeg(), reason=f"no TurboJPEG >= 3 here; {LIBRARY} may point to one")
def test_region_leaves_to_pil_what_it_cannot_do():
    choose = lambda height, width: (3, 5, 20, 30)  # noqa: E731
    cmyk = encode(SMOOTH.convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode(cmyk, 3, choose, "region"), decode(cmyk, 3, choose, "pil"))
    assert decode(encode(SMOOTH, "PNG"), 3, choose, "region").shape == (20, 30, 3)
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode(encode(SMOOTH, "JPEG")[:300], 3, choose, "region")


def test_region_without_its_library_says_what_to_do(tmp_path, monkeypatch):
    library.cache_clear()
    monkeypatch.setenv(LIBRARY, str(tmp_path / "libturbojpeg.so"))
    with pytest.raises(UserError, match=r"data.decoder: region needs TurboJPEG >= 3 .* or write data.decoder fast"):
        DataConfig(fake=True, decoder="region").check(3)
    library.cache_clear()
