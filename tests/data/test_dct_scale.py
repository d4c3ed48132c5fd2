"""data.dct_scale: the same box of a smaller decode of a large JPEG; never an upsampling that the whole would spare."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mae_dist.config import Config
from mae_dist.data import DataConfig, open_sources
from mae_dist.data.augment import finish, random_box, random_views, uniforms
from mae_dist.data.decode import decode, reduced
from mae_dist.data.turbojpeg import LIBRARY
from mae_dist.errors import UserError
from mae_dist.shards.write import shard
from mae_dist.train.resume import deciding
from tests.conftest import has_turbojpeg

SIZE = (64, 64)
HEIGHT, WIDTH = 601, 803  # no multiples of 8
VIEWS = random_views(np.zeros(40), np.arange(40), DataConfig(), 0)


def photo() -> Image.Image:
    """Random, with the 1 / f spectrum of photographs."""
    rng = np.random.default_rng(0)
    layers = [
        np.array(
            Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT)), dtype=np.float64
        )
        for n in (4, 16, 64, 256)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


PHOTO = photo()
LARGE = encode(PHOTO, quality=90)


def psnr(a, b) -> float:
    a, b = (torch.as_tensor(np.asarray(x)).double() for x in (a, b))
    return float(10 * torch.log10(255**2 / ((a - b) ** 2).mean().clamp(min=1e-9)))


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 2**30),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_the_smallest_decode_that_spares_an_upsampling_with_the_same_box_in_it(height, width, sample, least):
    config = DataConfig(crop_scale=(0.01, 1.0))
    box = random_box(height, width, config, uniforms(0, 0, sample, 41)[0, 1:])
    s, small = reduced(box, least)
    if s > 1:
        assert small[2] >= least[0] and small[3] >= least[1]
    else:
        assert small == box
    if s < 8:  # twice as small would be too small: half a pixel of rounding at either edge
        assert box[2] < (least[0] + 1) * 2 * s or box[3] < (least[1] + 1) * 2 * s
    for start, length, small_start, small_length, side in zip(
        box[:2], box[2:], small[:2], small[2:], (height, width), strict=True
    ):
        assert 0 <= small_start and small_start + small_length <= -(-side // s)
        assert abs(small_start * s - start) <= s / 2
        assert abs((small_start + small_length) * s - (start + length)) <= s / 2


def test_the_box_is_chosen_in_the_whole_image(monkeypatch):
    shapes, factors = [], []
    decode_jpeg = simplejpeg.decode_jpeg

    def remember(data, **options):
        pixels = decode_jpeg(data, **options)
        factors.append(-(-HEIGHT // pixels.shape[0]))
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", remember)
    for view in VIEWS:
        decode(LARGE, 3, lambda h, w, view=view: shapes.append((h, w)) or view.choose(h, w), least=SIZE)
    assert set(shapes) == {(HEIGHT, WIDTH)}
    assert set(factors) == {4, 8}, "the images of this test are not decoded smaller"


def test_views_are_those_of_the_whole_image_with_their_edges_moved_by_less_than_a_small_pixel():
    """37 dB against the full decode, cut at the box that was read: half a small pixel off and none reaches that."""
    whole = decode(LARGE)
    for view in VIEWS:
        s, (y, x, h, w) = reduced(view.choose(HEIGHT, WIDTH), SIZE)
        small = decode(LARGE, 3, view.choose, least=SIZE)
        assert small.shape == (h, w, 3)
        seen = finish(small, view, SIZE, DataConfig())
        moved = finish(whole[y * s : (y + h) * s, x * s : (x + w) * s], view, SIZE, DataConfig())
        assert psnr(seen, moved) > 37
        assert psnr(seen, finish(decode(LARGE, 3, view.choose), view, SIZE, DataConfig())) > 30


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_what_is_small_or_no_jpeg_is_as_without(form):
    image = PHOTO.resize((120, 90)) if form == "JPEG" else PHOTO
    data = encode(image, form)
    for view in VIEWS:
        np.testing.assert_array_equal(decode(data, 3, view.choose, least=SIZE), decode(data, 3, view.choose))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"grey": True}])
def test_all_kinds_of_jpeg_are_scaled(options):
    options = dict(options)
    data = encode(PHOTO.convert("L") if options.pop("grey", False) else PHOTO, **options)
    for channels in (1, 3):
        for view in VIEWS[:5]:
            _, (_, _, h, w) = reduced(view.choose(HEIGHT, WIDTH), SIZE)
            small = decode(data, channels, view.choose, least=SIZE)
            full = decode(data, channels, view.choose)
            assert small.shape == (h, w, channels) and h < full.shape[0]
            seen, there = (finish(pixels, view, SIZE, DataConfig()) for pixels in (small, full))
            assert psnr(seen, there) > 26


def test_broken_bytes_stay_broken():
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode(LARGE[: len(LARGE) // 2], 3, VIEWS[0].choose, least=SIZE)
    with pytest.raises(ValueError, match=r"more than data.max_pixels"):
        decode(LARGE, 3, VIEWS[0].choose, max_pixels=HEIGHT * WIDTH - 1, least=SIZE)


@pytest.mark.skipif(not has_turbojpeg(), reason=f"no TurboJPEG >= 3 here; {LIBRARY} may point to one")
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}, {"grey": True}]
)
def test_region_is_fast_to_the_bit(options):
    options = dict(options)
    data = encode(PHOTO.convert("L") if options.pop("grey", False) else PHOTO, **options)
    scales = set()
    for view in random_views(np.zeros(60), np.arange(60), DataConfig(crop_scale=(0.001, 1.0)), 0):
        scales.add(reduced(view.choose(HEIGHT, WIDTH), (40, 40))[0])
        for channels in (1, 3):
            fast, region = (decode(data, channels, view.choose, name, least=(40, 40)) for name in ("fast", "region"))
            np.testing.assert_array_equal(region, fast)
    assert scales == {1, 2, 4, 8}


def test_the_option_reaches_the_decoder(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.jpg").write_bytes(LARGE)
    shard(tmp_path / "images", tmp_path / "shards")
    for scaled in (False, True):
        config = DataConfig(shards=str(tmp_path / "shards"), dct_scale=scaled)
        crop, _ = open_sources(config, SIZE, 3)[0].pixels(0, 0)
        assert crop.shape == ((round(HEIGHT / 8), round(WIDTH / 8), 3) if scaled else (HEIGHT, WIDTH, 3))


def test_it_is_one_of_the_keys_that_decide_a_run():
    assert "data.dct_scale" in deciding(Config())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shards": "/x", "decoder": "pil"}, "data.decoder pil promises the official pixels; leave one out"),
        ({"shards": "/x", "repeated_aug": 2}, "data.repeated_aug cuts all views out of one decode"),
        ({"shards": "/x/{0..3}.tar", "mode": "webdataset"}, "mode webdataset decodes whole images"),
    ],
)
def test_what_cannot_be_had_together_is_refused(options, words):
    with pytest.raises(UserError, match=rf"data.dct_scale: .*{words}"):
        DataConfig(dct_scale=True, **options).check(3)
