"""The linear probe: LARS by its formula, a sweep that is many single trainings, statistics of the global batch."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mae_dist.config import Config
from mae_dist.data import Batch
from mae_dist.engine import EngineConfig, World, build_engine
from mae_dist.engine.lars import LARS
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.linear import Head, Probing
from mae_dist.evaluate.options import LinearConfig, LinearOptim, SweepConfig
from mae_dist.evaluate.sweep import choose_and_train, train_heads
from mae_dist.shards.order import SampleOrder
from mae_dist.train.options import TrainConfig
from mae_dist.train.schedule import CosineSchedule

ALONE = World(0, 1, torch.device("cpu"))
SCRATCH = Pretrained(Path("nowhere"), Config())
CONFIG = LinearConfig(
    optim=LinearOptim(warmup_epochs=1.0),
    train=TrainConfig(global_batch_size=16, steps=25, precision="fp32"),
    sweep=SweepConfig(blrs=(0.5, 20.0), weight_decays=(0.0, 0.1)),
)


class Probe:
    """The linear probe's objective on features that are its images, and its engine."""

    def __init__(self, config, num_classes=3, dim=12, accumulate=1):
        self.objective = Probing(SCRATCH, config)
        self.objective.accumulate, self.objective.waiting = accumulate, []
        self.objective.features, self.objective.autocast = (lambda x: x), nullcontext()
        module = Head(dim, num_classes, ALONE, config.train.seed)
        self.engine = build_engine(EngineConfig(), module, ALONE, config.optim, "fp32")
        self.model = module.network

    def take(self, features, labels):
        inputs = self.objective.inputs(features, Batch(features, labels, labels, labels))
        if inputs is not None:
            self.engine.forward_backward(*inputs, last=True)

    def predict(self, features):
        return self.objective.logits(self.model.eval(), features)


def clusters(n=60, dim=12, classes=3, seed=0):
    """Features (n, dim) around one centre a class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = 3 * torch.eye(classes, dim)
    return centres[labels] + torch.randn(n, dim, generator=generator), labels


def test_lars_is_its_formula():
    """As the official linear probe writes it: matrices get weight decay and trust, vectors plain momentum."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    optimizer = LARS([matrix, vector], lr=0.3, weight_decay=0.1, momentum=0.9, trust_coefficient=0.01)
    w, b = matrix.detach().clone(), vector.detach().clone()
    m_w, m_b = torch.zeros(4, 3), torch.zeros(4)
    for scale in (None, 8.0, 2.0):
        g_w, g_b = torch.randn(4, 3), torch.randn(4)
        matrix.grad, vector.grad = g_w * (scale or 1.0), g_b * (scale or 1.0)
        optimizer.grad_scale = torch.tensor(scale) if scale else None
        optimizer.step()
        d = g_w + 0.1 * w
        m_w = 0.9 * m_w + d * (0.01 * w.norm() / d.norm())
        m_b = 0.9 * m_b + g_b
        w, b = w - 0.3 * m_w, b - 0.3 * m_b
        torch.testing.assert_close(matrix.detach(), w)
        torch.testing.assert_close(vector.detach(), b)


def test_lars_moves_nothing_on_a_bad_step_and_from_zero_weights():
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([matrix], lr=1.0)
    matrix.grad = torch.full((2, 2), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(matrix.detach(), torch.ones(2, 2))
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], lr=1.0).step()
    assert torch.equal(zero.detach(), -torch.ones(2, 2))  # no trust in a norm of zero: plain gradient descent


@pytest.mark.parametrize(("blr", "decay"), [(0.5, 0.0), (20.0, 0.1)])
def test_a_sweep_is_many_single_trainings(blr, decay):
    """Each head of a sweep is the head that the probe's own classes train alone on the same batches."""
    features, labels = clusters()
    settings = [(0.5, 0.0), (0.5, 0.1), (20.0, 0.0), (20.0, 0.1)]
    heads = train_heads(features, labels, 3, settings, CONFIG, 7, ALONE)
    config = replace(CONFIG, optim=replace(CONFIG.optim, weight_decay=decay), train=replace(CONFIG.train, seed=7))
    probe = Probe(config, accumulate=2)
    order, schedule = SampleOrder([60], 7), CosineSchedule(blr * 16 / 256, 0.0, 60 / 16, 25)
    for k in range(25):
        ids = torch.from_numpy(order.lookup(range(k * 16, k * 16 + 16)).id)
        for part in ids.split(8):
            probe.take(features[part], labels[part])
        probe.engine.step(schedule.lr(k))
    h = settings.index((blr, decay))
    norm, linear = probe.model
    torch.testing.assert_close(heads.weight[h], linear.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(heads.bias[h], linear.bias.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(heads.mean, norm.running_mean)
    torch.testing.assert_close(heads.variance, norm.running_var)
    right = (probe.predict(features).argmax(1) == labels).double().mean()
    assert heads.accuracy(features, labels, ALONE)[h] == right


def test_the_probe_without_ranks_is_torchs_batch_norm_and_autograd():
    features, labels = clusters(16)
    probe = Probe(CONFIG)
    plain = nn.Sequential(nn.BatchNorm1d(12, eps=1e-6, affine=False), nn.Linear(12, 3))
    plain.load_state_dict(probe.model.state_dict())
    loss = F.cross_entropy(plain(features), labels)
    loss.backward()
    probe.take(features, labels)
    torch.testing.assert_close(probe.engine.loss, loss.detach())
    torch.testing.assert_close(probe.model[1].weight.grad, plain[1].weight.grad)
    torch.testing.assert_close(probe.model[0].running_var, plain[0].running_var)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bad_batch_moves_nothing_of_the_probe(bad):
    """Not even its running statistics."""
    features, labels = clusters(16)
    probe = Probe(CONFIG)
    before = {key: value.clone() for key, value in probe.model.state_dict().items()}
    spoilt = features.clone()
    spoilt[3, 5] = bad
    for images, skipped in ((spoilt, 1), (features, 0)):
        probe.take(images, labels)
        assert probe.engine.step(1.0).skipped == skipped
        after = probe.model.state_dict()
        assert all(torch.equal(before[key], after[key]) == bool(skipped) for key in ("0.running_mean", "0.running_var"))
        assert torch.equal(before["1.weight"], after["1.weight"]) == bool(skipped)


def test_the_test_images_choose_nothing():
    """Other test labels: the same setting is chosen; and what is chosen has the best held-out accuracy."""
    train, test = clusters(80), clusters(40, seed=1)
    sweep = SweepConfig(blrs=(0.01, 100.0), weight_decays=(0.0,))
    config = replace(CONFIG, sweep=sweep, train=replace(CONFIG.train, steps=300))
    found = choose_and_train(train, test, 3, config, 0, ALONE)
    blind = choose_and_train(train, (test[0], (test[1] + 1) % 3), 3, config, 0, ALONE)
    assert found.blr == 100
    assert replace(found, test=0.0) == replace(blind, test=0.0)
    assert found.test > 0.8 > 0.4 > blind.test
