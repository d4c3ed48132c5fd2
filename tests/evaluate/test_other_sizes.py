"""Evaluation at another size of images than pretraining's, and what cannot change when it goes on."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_dist.cli import finetune, knn, linear
from mae_dist.config import Config
from mae_dist.data.options import DataConfig
from mae_dist.engine import EngineConfig, World, build_engine, capture, restore
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.classifier import classifier
from mae_dist.evaluate.finetune import Finetuning
from mae_dist.evaluate.options import FinetuneConfig, NetworkConfig
from mae_dist.evaluate.reconstruct import Viewer
from mae_dist.exchange.runs import write
from mae_dist.model import MAE, MAEConfig
from mae_dist.model.positions import sincos_2d
from mae_dist.train.options import TrainConfig

MODEL = MAEConfig(
    "vit_tiny_patch16_224", img_size=16, patch_size=4, dec_dim=32, dec_depth=1, dec_heads=2,
    enc_dim=32, enc_depth=2, enc_heads=2,
)  # fmt: skip
QUICK = ["--train.steps=1", "--train.global_batch_size=4", "--data.workers=0", "--track.mlflow=false"]


def pretrained(tmp_path: Path, learned: bool = False, in_chans: int = 3, shards: Path | None = None) -> Path:
    torch.manual_seed(0)
    config = Config(
        dataclasses.replace(MODEL, in_chans=in_chans),
        DataConfig(shards=str(shards) if shards else None, val_shards=str(shards) if shards else None, workers=0),
        train=TrainConfig(name="small", runs_dir=str(tmp_path), precision="fp32", device="cpu"),
    )
    weights = dict(MAE(config.model).state_dict())
    if learned:
        weights["encoder.pos_embed"] = torch.randn(1, 17, 32)
    write(tmp_path / "small", config, weights, {"file": "a test"})
    return tmp_path / "small"


@pytest.mark.parametrize(("learned", "how"), [(False, "recomputed"), (True, "interpolated")])
def test_positions_are_made_for_the_new_grid_and_it_is_said_how(tmp_path, learned, how, capsys):
    run = Pretrained.find(pretrained(tmp_path, learned)).at((16, 32))
    assert f"positions of the encoder: {how}, 4x4 -> 4x8" in capsys.readouterr().err
    vit = classifier(run, NetworkConfig(), 2, 0).eval()
    assert vit(torch.zeros(1, 3, 16, 32)).shape == (1, 2)
    table = vit.state_dict()["pos_embed"][0]
    assert table.shape == (33, 32) and torch.equal(table, sincos_2d(32, 4, 8)) == (not learned)
    with pytest.raises(UserError, match="does not divide into patches"):
        Pretrained.find(tmp_path / "small").at(30)
    assert Pretrained.find(tmp_path / "small").at(None).own is None


def test_the_commands_take_another_size(tmp_path, shards, capsys):
    run, at_once = str(pretrained(tmp_path, shards=shards)), "--optim.warmup_epochs=0"
    assert finetune([run, *QUICK, "--network.img_size=24", "--augment.rand_augment=null", at_once]) == 0
    assert linear([run, *QUICK, "--network.img_size=24", at_once]) == 0
    assert knn([run, "--k", "3", "--img-size", "24"]) == 0
    assert capsys.readouterr().err.count("positions of the encoder: recomputed, 4x4 -> 6x6") == 3
    saved = load_file(Path(run) / "evaluations" / "finetune" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert saved["pos_embed"].shape == (1, 37, 32)


def engine_of(pool="mean", classes=5, img_size=16):
    run = Pretrained(Path("nowhere"), Config(model=dataclasses.replace(MODEL, img_size=img_size)))
    config = FinetuneConfig(network=NetworkConfig("none", pool))
    tuning = Finetuning(run, config)
    tuning.num_classes = classes
    world = World(0, 1, torch.device("cpu"))
    return build_engine(EngineConfig(), tuning.build(world, 1), world, config.optim, "fp32")


@pytest.mark.parametrize(
    ("change", "key"), [({"pool": "cls"}, "norm"), ({"classes": 6}, "head"), ({"img_size": 24}, "pos_embed")]
)
def test_what_cannot_change_in_a_run_is_named(tmp_path, change, key):
    for name, ours, theirs in (("there", {}, change), ("back", change, {})):
        (tmp_path / name).mkdir()
        capture(engine_of(**ours)).write(tmp_path / name)
        restore(engine_of(**ours), tmp_path / name)
        with pytest.raises(UserError, match=rf"a checkpoint of another model: \S*{key}.*config.yaml beside"):
            restore(engine_of(**theirs), tmp_path / name)


@pytest.mark.parametrize("in_chans", [2, 4])
def test_channels_that_no_image_has_are_refused_before_the_first_step(tmp_path, in_chans, shards):
    run = pretrained(tmp_path, in_chans=in_chans, shards=shards)
    for command in (lambda: finetune([str(run), *QUICK]), lambda: knn([str(run)]), lambda: Viewer(run, [shards])):
        with pytest.raises(UserError, match=f"model.in_chans: {in_chans}: images are read as grey or RGB"):
            command()


def test_drop_path_is_refused_where_blocks_have_no_place_for_it():
    run = Pretrained(Path("nowhere"), Config(model=dataclasses.replace(MODEL, enc_name="vit_small_patch16_18x2_224")))
    with pytest.raises(UserError, match=r"network.drop_path: 0.1: the parallel blocks of vit_small_"):
        classifier(run, NetworkConfig("none"), 2, 0)
    classifier(run, NetworkConfig("none", drop_path=0.0), 2, 0)
