"""The pictures of `mae-dist reconstruct`: every panel is what its caption says."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mae_dist.cli import COMMANDS
from mae_dist.config import Config
from mae_dist.errors import UserError
from mae_dist.evaluate.pca import pca_colours
from mae_dist.evaluate.reconstruct import Viewer
from mae_dist.exchange.runs import write
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.masking import split
from mae_dist.model.patches import patchify
from tests.conftest import mae_dist

CONFIG = MAEConfig(img_size=(96, 128), patch_size=16, enc_dim=32, enc_depth=1, enc_heads=2, dec_dim=32, dec_depth=1,
                   dec_heads=2)  # fmt: skip


@pytest.fixture(params=[False, True], ids=["pixels", "norm_pix"])
def run(request, tmp_path):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, norm_pix_loss=request.param)
    write(tmp_path / "run", Config(config), dict(MAE(config).state_dict()), {"file": "a test"})
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((210, 150), Image.Resampling.BICUBIC).save(path)
    return paths


def panels(picture: Image.Image, across: int) -> torch.Tensor:
    """(rows, across, 96, 128, 3): the tiles of a grid of one image a row."""
    pixels = torch.from_numpy(np.asarray(picture).copy())
    rows = (picture.height - 20) // 106
    top = picture.height - rows * 106
    return torch.stack([
        torch.stack([pixels[top + r * 106 :, 10 + k * 130 :][:96, :128] for k in range(across)]) for r in range(rows)
    ])  # fmt: skip


def test_panels_are_what_their_captions_say(run, photos):
    viewer = Viewer(run, photos, mask_ratio=0.5)
    tiles = panels(viewer.reconstruction([3, 4]), 4).permute(0, 1, 4, 2, 3)
    assert len(tiles) == 4  # two images with two masks each
    ids = torch.tensor([0, 1])
    noise = [viewer.config.model.noise(seed, torch.zeros_like(ids), ids) for seed in (3, 4)]
    for row, tile in enumerate(tiles):
        image, seed = divmod(row, 2)
        assert torch.equal(tile[0], viewer.pixels[image])
        whole, masked, bare, pasted = patchify(tile, 16)
        keep, hidden = (ids[0] for ids in split(noise[seed][image : image + 1], 24))
        assert torch.equal(masked[keep], whole[keep]) and (masked[hidden] == 127).all()
        assert (pasted[keep].int() - whole[keep].int()).abs().max() <= 1  # through normalisation and back
        assert (pasted[hidden].int() - bare[hidden].int()).abs().max() <= 1
        assert not torch.equal(bare[keep], whole[keep])


def test_the_command_writes_both_pictures_and_says_once_how_norm_pix_is_shown(run, photos, tmp_path):
    options = ["--seed", 0, 1, "--mask-ratio", 0.6, "--out", tmp_path / "new/r.png", "--features", tmp_path / "f.png"]
    said = mae_dist("reconstruct", run, *photos, *options).stdout
    norm_pix = Viewer(run, photos).config.model.norm_pix_loss
    assert said.count("mean and variance of the true patch") == int(norm_pix)
    assert panels(Image.open(tmp_path / "new/r.png"), 4).shape[0] == 4
    tiles = panels(Image.open(tmp_path / "f.png"), 2)
    colours = tiles[:, 1].unflatten(1, (6, 16)).unflatten(3, (8, 16))
    assert (colours == colours[:, :, :1, :, :1]).all()  # one colour a patch


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grid", "grid: no picture can be written under this name; write .*grid.png"),
        ("grid.xyz", "write .*grid.png"),
        ("a.png/grid.png", "its directory cannot be made"),
        ("dir.png", "is a directory"),
    ],
)
def test_where_no_picture_can_be_written_nothing_is_computed(tmp_path, name, says):
    """There is no such run, and nobody looked for it."""
    (tmp_path / "a.png").touch()
    (tmp_path / "dir.png").mkdir()
    for command in (["reconstruct", "none", "x", "--out"], ["reconstruct", "none", "x", "--features"],
                    ["info", "none", "--sheet"]):  # fmt: skip
        with pytest.raises(UserError, match=says):
            COMMANDS[command[0]]([*command[1:], str(tmp_path / name)])


def test_impossible_ratios_and_files_are_named(run, photos, tmp_path):
    with pytest.raises(UserError, match=r"model.mask_ratio: 1.0: write a number in \(0, 1\)"):
        Viewer(run, photos, mask_ratio=1.0)
    with pytest.raises(UserError, match=r"absent.png: cannot be read as an image"):
        Viewer(run, [tmp_path / "absent.png"])
    os.mkfifo(tmp_path / "fifo.png")
    for name, kind in ((tmp_path / "fifo.png", "a FIFO"), ("/dev/zero", "a device")):  # which have no end
        with pytest.raises(UserError, match=f"{name}: is {kind}; write an image file"):
            Viewer(run, [name])


def test_colours_are_the_principal_components():
    """Three directions of falling variance come out as the three channels, in that order, whatever their sign."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 12)).Q[:3]
    amounts = torch.randn(2, 500, 3) * torch.tensor([9.0, 3.0, 1.0])
    features = amounts @ directions + 5 + torch.randn(2, 500, 12) * 0.01
    colours = pca_colours(features)
    assert colours.shape == (2, 500, 3) and colours.dtype == torch.uint8
    together = torch.cat([colours.flatten(0, 1).double(), amounts.flatten(0, 1).double()], dim=1).T
    correlation = torch.corrcoef(together)[:3, 3:].abs()
    assert (correlation.diag() > 0.97).all() and (correlation - correlation.diag().diag()).max() < 0.15
    assert torch.equal(pca_colours(features * 2 - 1), colours)
    assert pca_colours(torch.ones(1, 2, 8)).shape == (1, 2, 3)  # fewer patches than components
