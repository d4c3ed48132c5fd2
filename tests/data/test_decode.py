"""Pixels: strict JPEG, PIL as the word that counts, no image invented from broken bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from mae_dist.data.decode import decode

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


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.95])
def test_truncated_data_raises(keep):
    data = encode(SMOOTH, "JPEG")
    cut = data[: int(keep * len(data)) if isinstance(keep, float) else keep]
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode(cut)
