"""Fine-tuning's parts: the recipe's learning rates, dice that depend on the sample alone, timm's own model."""

import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mae_dist import config as configs
from mae_dist.data import Batch, DataConfig
from mae_dist.engine import EngineConfig, World, build_engine, capture, restore
from mae_dist.errors import UserError
from mae_dist.evaluate.augment import Mix, finetune_views, posterize, rand_augmentation
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.checkpoints import load as load_model
from mae_dist.evaluate.classifier import Coins, KeyedDropPath, classifier
from mae_dist.evaluate.finetune import Finetuning
from mae_dist.evaluate.options import AugmentConfig, FinetuneConfig, FinetuneOptim, LinearConfig, NetworkConfig
from mae_dist.evaluate.supervised import load
from mae_dist.exchange.runs import write
from mae_dist.model import MAE, MAEConfig
from mae_dist.train.options import TrainConfig

MODEL = MAEConfig(
    "vit_tiny_patch16_224", img_size=16, patch_size=4, dec_dim=32, dec_depth=1, dec_heads=2,
    enc_dim=32, enc_depth=3, enc_heads=2,
)  # fmt: skip
SCRATCH = Pretrained(Path("nowhere"), configs.Config(model=MODEL))
CONFIGS = Path(__file__).parents[2] / "configs"


ALONE = World(0, 1, torch.device("cpu"))


def vit(pool="mean", drop_path=0.0):
    return classifier(SCRATCH, NetworkConfig("none", pool, drop_path), num_classes=5, seed=0)


class Learner:
    """Fine-tuning's objective and its engine."""

    def __init__(self, precision="fp32", size=8, **augment):
        config = FinetuneConfig(
            augment=AugmentConfig(**augment), train=TrainConfig(global_batch_size=size), optim=FinetuneOptim(ema=0.5),
            network=NetworkConfig("none", drop_path=0.5),
        )  # fmt: skip
        self.objective = Finetuning(SCRATCH, config)
        self.objective.num_classes = 5
        module = self.objective.build(ALONE, 1)
        self.engine = build_engine(EngineConfig(), module, ALONE, config.optim, precision)

    def step(self, images, who, lr=1e-3):
        self.engine.forward_backward(*self.objective.inputs(images.clone(), who), last=True)
        return self.engine.step(lr)

    def state(self):
        whole = {name: self.engine.gather(name) for name in self.engine.shapes}
        kept = {f"{kind}.{name}": t for name, w in whole.items() for kind, t in w.state.items()}
        return kept | {name: w.weight.detach() for name, w in whole.items()} | self.engine.counters()


def test_each_layer_has_the_recipes_learning_rate_and_decay():
    """decay ** (depth + 1 - layer); 1-D parameters, class token and positions are not decayed (util/lr_decay.py)."""
    model = vit()
    groups = FinetuneOptim(layer_decay=0.65, weight_decay=0.05).optimizer(model).groups
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else 4
        plain = p.ndim == 1 or name in ("cls_token", "pos_embed")
        assert found[id(p)] == (pytest.approx(0.65 ** (4 - layer)), 0.0 if plain else 0.05), name
    assert found.keys() == {id(p) for p in model.parameters()}  # positions too are trained


def test_the_classifier_is_timms_model():
    """Its weights load strictly into timm's own model, with the same logits."""
    ours = vit().eval()
    with torch.no_grad():
        ours.head.weight.normal_()
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5,
        global_pool="avg",
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images))


def test_drop_path_keeps_the_mean_and_depends_on_the_sample_alone():
    coins = Coins()
    drop = KeyedDropPath(0.3, coins, 2).train()
    ids, epochs = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    x = torch.ones(20_000, 1, 1)
    coins.throw(0, epochs, ids, 4)
    whole = drop(x)
    assert whole.mean() == pytest.approx(1, abs=0.02)
    coins.throw(0, epochs[:7], ids[100:107], 4)
    assert torch.equal(drop(x[:7]), whole[100:107])
    coins.throw(0, epochs + 1, ids, 4)
    assert not torch.equal(drop(x), whole)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_depends_on_seed_epoch_and_sample_alone(channels):
    """Whatever the global generators hold, and they are left as they were."""
    data = DataConfig(mean=(0.5,), std=(0.5,))
    pixels = torch.randint(0, 256, (channels, 32, 32), dtype=torch.uint8)
    kept = []
    for world in range(2):
        random.seed(world)
        np.random.seed(world)
        before = random.getstate(), np.random.get_state()[1].tolist()
        views = finetune_views(np.array([0, 0, 1]), np.array([4, 5, 4]), data, AugmentConfig(), 3)
        kept.append([view.after(pixels) for view in views])
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert not torch.equal(kept[0][0], kept[0][1])
    assert not torch.equal(kept[0][0], kept[0][2])
    assert kept[0][0].shape == pixels.shape and kept[0][0].dtype == torch.uint8


def test_every_operation_of_rand_augment_works_at_full_magnitude():
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for op in rand_augmentation("rand-m10-mstd0-inc1", 14, (128, 128, 128)).ops:
        op.prob = 1.0
        assert op(image).size == image.size
    assert np.array(posterize(image, 0)).max() == 0
    assert np.array_equal(np.array(posterize(image, 3)), np.array(image) & 0b11100000)


def test_mixing_is_repeatable_and_targets_are_shares():
    mix = Mix(AugmentConfig(), 5, seed=1)
    labels, ids, epochs = torch.tensor([0, 1, 2, 3]), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    images = torch.randn(4, 3, 16, 16)
    first, targets = mix(images.clone(), labels, epochs, ids)
    torch.rand(3)
    again, _ = mix(images.clone(), labels, epochs, ids)
    assert torch.equal(first, again) and not torch.equal(first, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    plain = Mix(AugmentConfig(erase=0, mixup=0, cutmix=0), 5, seed=1)
    assert torch.equal(plain(images.clone(), labels, epochs, ids)[0], images)


def test_erasing_touches_about_its_share_of_the_images():
    mix = Mix(AugmentConfig(erase=0.25, mixup=0, cutmix=0), 5, seed=1)
    ids = torch.arange(400)
    images, _ = mix(torch.zeros(400, 1, 16, 16), ids % 5, torch.zeros_like(ids), ids)
    assert 60 < int((images.flatten(1) != 0).any(1).sum()) < 140


def batch(n=8):
    ids = torch.arange(n)
    return torch.randn(n, 3, 16, 16), Batch(torch.empty(0), ids, torch.zeros_like(ids), ids % 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("augment", [{}, {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0}])
def test_a_bad_number_moves_nothing_and_a_good_one_everything(augment, precision):
    tuned = Learner(precision, **augment)
    images, who = batch()
    for images_, skipped in ((images * torch.nan, 1), (images, 0)):
        before = {name: tensor.clone() for name, tensor in tuned.state().items()}
        assert tuned.step(images_, who).skipped == skipped
        after, moved = tuned.state(), ("head.bias", "pos_embed", "ema.head.bias", "ema.pos_embed")
        assert all(torch.equal(before[name], after[name]) == bool(skipped) for name in moved)


def test_fp16_is_fp32_but_for_rounding():
    """Also when the first scale of the loss is too large: updates are left out until it fits."""
    whole, half = Learner(), Learner("fp16")
    half.engine.update.loss_scale.fill_(2.0**25)
    images, who = batch()
    results = []
    for tuned in (whole, half):
        while tuned.engine.update.done < 3 and len(results) < 40:
            results.append(tuned.step(images, who))
    assert [int(result.skipped) for result in results] == [0] * 3 + [1] * (len(results) - 6) + [0] * 3
    assert len(results) > 6
    for one, other in zip(results[:3], results[-3:], strict=True):
        torch.testing.assert_close(one.loss, other.loss, rtol=3e-3, atol=0)
        torch.testing.assert_close(one.grad_norm, other.grad_norm, rtol=3e-2, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_is_the_whole_state(tmp_path, precision):
    """Written, read into a fresh one, both go on: the same to the bit, moving average and loss scale too."""
    first, second = Learner(precision), Learner(precision)
    if precision == "fp16":
        first.engine.update.loss_scale.fill_(2.0**9)
    images, who = batch()
    for _ in range(2):
        first.step(images, who, 1e-2)
    capture(first.engine).write(tmp_path)
    restore(second.engine, tmp_path)
    for tuned in (first, second):
        tuned.step(images, who, 1e-2)
    states = [tuned.state() for tuned in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    kinds = {key.split(".")[0] for key in states[0] if key.endswith(".head.weight")}
    assert kinds == {"exp_avg", "exp_avg_sq", "ema"}
    assert torch.equal(first.engine.replica().head.weight, states[0]["ema.head.weight"])
    assert not torch.equal(states[0]["ema.head.weight"], states[0]["head.weight"])


def test_a_checkpoint_of_the_layout_before_is_read(tmp_path):
    """The moving average had a file of its own, with the names of the weights."""
    tuned, fresh = Learner(), Learner()
    images, who = batch()
    for _ in range(2):
        tuned.step(images, who, 1e-2)
    state = tuned.state()
    average = {name.removeprefix("ema."): tensor for name, tensor in state.items() if name.startswith("ema.")}
    weights = {name: state[name] for name in tuned.engine.shapes}
    moments = {name: tensor for name, tensor in state.items() if name.startswith("exp_avg")}
    moments |= {f"step.{name}": torch.tensor(2.0) for name in weights} | {"counter.updates": state["updates"]}
    for name, tensors in (("model", weights), ("optimizer", moments), ("ema", average)):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    restore(fresh.engine, tmp_path)
    assert fresh.state().keys() == state.keys()
    for learner in (tuned, fresh):
        learner.step(images, who, 1e-2)
    assert all(torch.equal(tensor, fresh.state()[name]) for name, tensor in tuned.state().items())


def test_damaged_weights_are_not_finetuned(tmp_path):
    write(tmp_path / "run", SCRATCH.config, dict(MAE(MODEL).state_dict()), {"file": "a test"})
    whole = Pretrained.find(tmp_path / "run")
    assert torch.equal(
        classifier(whole, NetworkConfig(), 5, 0).cls_token, load_model(whole.checkpoint).encoder.cls_token
    )
    with (whole.checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"damaged checkpoint: .*checksum"):
        classifier(whole, NetworkConfig(), 5, 0)


def test_crops_are_the_recipes_and_else_the_runs(tmp_path):
    """Pretraining's scale of crops is not the recipe's; what a config or the command line says wins."""
    data = DataConfig("x", val_shards="y", crop_scale=(0.5, 1.0), crop_ratio=(0.9, 1.1), mean=(0.5,), std=(0.5,))
    write(tmp_path / "run", configs.Config(MODEL, data), dict(MAE(MODEL).state_dict()), {"file": "a test"})
    (tmp_path / "c.yaml").write_text("data:\n  crop_scale: [1, 1]\n")
    for kind, name in ((FinetuneConfig, "finetune"), (LinearConfig, "linear")):
        for more, scale in (
            ([], (0.08, 1.0)),
            (["--data.crop_scale=[0.3,1]"], (0.3, 1.0)),
            (["--config", str(tmp_path / "c.yaml")], (1.0, 1.0)),
        ):
            _, config = load(kind, name, [str(tmp_path / "run"), *more], batch=16, epochs=1)
            assert (config.data.crop_scale, config.data.crop_ratio) == (scale, (0.9, 1.1))
            assert config.data.crop_clip == (name == "linear")


def test_mixup_needs_pairs():
    with pytest.raises(UserError, match="even"):
        Learner(size=9)


def test_class_token_pooling_keeps_the_encoders_norm():
    model = vit("cls")
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.fc_norm, nn.Identity)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("size", "blr", "decay", "drop", "epochs", "linear"),
    [("b16", 5e-4, 0.65, 0.1, 100, 90), ("l16", 1e-3, 0.75, 0.2, 50, 50), ("h14", 1e-3, 0.75, 0.3, 50, 50)],
)
def test_the_recipes_of_the_papers_code(size, blr, decay, drop, epochs, linear):
    """Every value of FINETUNE.md."""
    data = {"data.shards": "x", "data.val_shards": "y"}
    c = configs.load(
        ["--config", str(CONFIGS / f"finetune_vit_{size}.yaml")], "mae-dist finetune", FinetuneConfig, data
    )
    c.check(3)
    o, a = c.optim, c.augment
    assert (o.blr, o.min_lr, o.warmup_epochs, o.betas) == (blr, 1e-6, 5, (0.9, 0.999))
    assert (o.weight_decay, o.layer_decay, c.network.drop_path, c.network.pool) == (0.05, decay, drop, "mean")
    assert (a.rand_augment, a.erase, a.mixup, a.cutmix, a.smoothing) == ("rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0, 0.1)
    assert (c.train.global_batch_size, c.train.epochs, c.data.crop_scale) == (1024, epochs, (0.08, 1.0))
    c = configs.load(["--config", str(CONFIGS / f"linear_vit_{size}.yaml")], "mae-dist linear", LinearConfig, data)
    c.check(3)
    o = c.optim
    assert (o.blr, o.min_lr, o.warmup_epochs, o.momentum, o.weight_decay) == (0.1, 0.0, 10, 0.9, 0.0)
    assert (c.train.global_batch_size, c.train.epochs, c.network.pool) == (16384, linear, "cls")
    assert (c.data.crop_scale, c.data.crop_clip, c.data.flip) == ((0.08, 1.0), True, 0.5)
