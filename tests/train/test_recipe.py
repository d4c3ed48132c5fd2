"""The shipped configs are the paper's recipe: which weights decay, and the learning rate of every update."""

import math
from pathlib import Path

import pytest
import torch

from mae_dist import config as configs
from mae_dist.engine.optim import param_groups
from mae_dist.model import MAE
from mae_dist.model.formats import convert
from mae_dist.train.schedule import CosineSchedule

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET = 1_281_167
RECIPES = {"vit_b16": (85, 167), "vit_l16": (133, 263), "vit_h14": (165, 327)}  # tensors with and without decay


def load(name: str) -> configs.Config:
    return configs.load(["--config", str(CONFIGS / f"{name}.yaml")])


@pytest.mark.parametrize("name", RECIPES)
def test_weights_decay_as_timm_grouped_them_for_the_papers_code(name):
    """No decay for what has one dimension or is a bias by name; class and mask token have three, and decay."""
    config = load(name)
    with torch.device("meta"):
        model = MAE(config.model)
    names = {id(weight): key for key, weight in model.named_parameters()}
    groups = param_groups(model, config.optim.weight_decay)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, plain = ({names[id(weight)] for weight in group["params"]} for group in groups)
    frozen = {"encoder.pos_embed", "dec_pos"}
    theirs = convert({key: w for key, w in model.named_parameters() if key not in frozen}, "mae_dist", "official")
    expected = {key for key, weight in theirs.items() if not (weight.ndim == 1 or key.endswith(".bias"))}
    assert {*convert({key: torch.empty(0) for key in decayed}, "mae_dist", "official")} == expected
    assert {"encoder.cls_token", "mask_token"} <= decayed
    assert decayed | plain == set(names.values()) - frozen and not decayed & plain
    assert (len(decayed), len(plain)) == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_the_learning_rate_of_every_update(name):
    """The official formula in epochs, written out: blr * batch / 256, 40 epochs from exactly 0, half a cosine to 0."""
    config = load(name)
    batch, epochs = config.train.global_batch_size, config.train.epochs
    assert (batch, epochs, config.optim.betas, config.optim.clip_grad) == (4096, 800, (0.9, 0.95), None)
    epoch_steps = IMAGENET / batch
    steps = math.ceil(epochs * epoch_steps)
    peak = config.optim.peak_lr(batch)
    schedule = CosineSchedule(peak, config.optim.min_lr, config.optim.warmup_epochs * epoch_steps, steps)
    assert peak == pytest.approx(2.4e-3)
    for step in range(steps):
        epoch = step / epoch_steps
        if epoch < 40:
            expected = 2.4e-3 * epoch / 40
        else:
            expected = 2.4e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / (800 - 40)))
        assert abs(schedule.lr(step) - expected) < 1e-8  # of 2.4e-3: the last epoch ends within a step of 800
    assert schedule.lr(0) == 0.0


@pytest.mark.parametrize("name", RECIPES)
def test_crops_and_model_are_the_papers(name):
    config = load(name)
    data, model = config.data, config.model
    assert (data.crop_scale, data.flip) == ((0.2, 1.0), 0.5)
    assert data.crop_ratio == pytest.approx((3 / 4, 4 / 3), abs=0)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (model.dec_dim, model.dec_depth, model.dec_heads, model.mask_ratio) == (512, 8, 16, 0.75)
    assert model.norm_pix_loss and model.masking == "random" and model.predict_ratio == 1.0
