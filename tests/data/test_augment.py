"""Law 1 for pixels: a crop depends on (seed, epoch, sample) only, and is distributed as in the paper's code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mae_dist.data.augment import TRIES, augment, centre, centre_box, random_box, resize, uniforms
from mae_dist.data.options import DataConfig

CONFIG = DataConfig()
PIXELS = np.array(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((120, 90))
)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**40), st.floats(0.01, 1), st.floats(0.2, 1))
def test_boxes_lie_inside(height, width, sample, low, ratio):
    config = DataConfig(crop_scale=(low, 1.0), crop_ratio=(ratio, 1 / ratio))
    top, left, h, w = random_box(height, width, config, uniforms(0, 0, sample, 1 + 4 * TRIES)[0, 1:])
    assert 0 <= top and 0 <= left and 0 < h and 0 < w
    assert top + h <= height and left + w <= width


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 300), st.integers(1, 300), st.floats(0.1, 1))
def test_centre_boxes_lie_inside(height, width, out_height, out_width, share):
    top, left, h, w = centre_box(height, width, (out_height, out_width), share)
    assert 0 <= top and 0 <= left and 0 < h and 0 < w
    assert top + h <= height and left + w <= width


def test_crops_are_distributed_as_torchvision_draws_them():
    """Area, shape and place against RandomResizedCrop.get_params, by the two-sample test of Kolmogorov and Smirnov."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    n, image = 4000, torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = np.array([random_box(375, 500, CONFIG, uniforms(7, 1, i, 1 + 4 * TRIES)[0, 1:]) for i in range(n)])

    def numbers(rows):
        top, left, height, width = rows.T.astype(float)
        return [top, left, height, width, height * width, width / height, top / (376 - height), left / (501 - width)]

    limit = 1.95 * np.sqrt(2 / n)  # exceeded once in a thousand by chance; the draws are fixed
    for mine, their in zip(numbers(ours), numbers(theirs), strict=True):
        values = np.concatenate([mine, their])
        steps = [np.searchsorted(np.sort(x), values, side="right") / n for x in (mine, their)]
        assert np.abs(steps[0] - steps[1]).max() < limit


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (11, 13)])
def test_where_no_crop_fits_the_largest_allowed_one_in_the_middle_is_taken(height, width):
    """All tries ask for more than there is; as torchvision's, whose scale here lets none fit either."""
    from torchvision.transforms import RandomResizedCrop

    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [2.0, 3.0], list(CONFIG.crop_ratio))
    assert random_box(height, width, replace(CONFIG, crop_scale=(2.0, 3.0)), uniforms(7, 1, 3, 4 * TRIES)[0]) == theirs


def test_flips_are_fair_and_apart_from_crops():
    first = np.array([uniforms(0, 0, i, 2)[0] for i in range(4000)])
    assert abs((first[:, 0] < 0.5).mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.08


def test_a_view_depends_on_seed_epoch_and_sample_only():
    def view(seed, epoch, sample):
        return augment(PIXELS, epoch, sample, (32, 32), CONFIG, seed)

    torch.manual_seed(1)
    before = view(0, 0, 0)
    torch.manual_seed(2)
    assert torch.equal(before, view(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(before, view(*other))


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_shapes_and_types(size):
    for image in (augment(PIXELS, 0, 0, size, CONFIG, 0), centre(PIXELS, size, CONFIG)):
        assert image.shape == (3, *size)
        assert image.dtype == torch.uint8
        assert image[None].is_contiguous(memory_format=torch.channels_last), "repacked on the way"


def test_resizing_is_pils_antialiased_bicubic():
    """At least 50 dB against PIL on a photograph-like image."""
    ours = resize(PIXELS[5:85, 10:110], (32, 32)).permute(1, 2, 0).numpy().astype(float)
    crop = Image.fromarray(PIXELS[5:85, 10:110])
    theirs = np.array(crop.resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    assert 10 * np.log10(255**2 / max(1e-9, ((ours - theirs) ** 2).mean())) > 50


def test_no_crop_and_no_flip_change_nothing():
    config = DataConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.0, eval_crop=1.0)
    square = np.ascontiguousarray(PIXELS[:90, :90])
    for sample in range(20):
        assert torch.equal(augment(square, 0, sample, (90, 90), config, 0), torch.from_numpy(square).permute(2, 0, 1))
    assert torch.equal(centre(square, (90, 90), config), torch.from_numpy(square).permute(2, 0, 1))


def test_a_clipped_crop_is_drawn_once_and_cut_to_the_image():
    """As the official linear probe draws them: width and height clipped each, never the centre instead."""
    config = DataConfig(crop_clip=True, crop_scale=(0.9, 1.0))
    draws = uniforms(0, 0, np.arange(500), 1 + 4 * TRIES)[:, 1:]
    boxes = [random_box(100, 40, config, u) for u in draws]
    first = np.array([random_box(100, 40, config, u[:4]) for u in draws])
    assert np.array_equal(np.array(boxes), first)
    assert (first[:, 3] == 40).all() and (first[:, 2] < 100).all()  # a ratio of 3/4 or more is wider than the image
    assert len({box[0] for box in boxes}) > 20
