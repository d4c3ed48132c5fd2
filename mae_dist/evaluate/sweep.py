"""Many linear probes at once on the same features: all heads are one matrix, each update one matmul.

The features of centred crops are made once and kept on disk. Every base learning rate is tried with every weight
decay; a held-out part of the training labels chooses, then the chosen probe is trained on all of them and meets the
test images for the first time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dist import config as configs
from mae_dist.data import labels_of, subset
from mae_dist.data.labels import Ints, choose
from mae_dist.engine import World
from mae_dist.engine.lars import trust
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.features import extract
from mae_dist.evaluate.knn import asked, labelled_sources, metric
from mae_dist.evaluate.options import LinearConfig
from mae_dist.evaluate.tracked import logged, name_of
from mae_dist.shards.order import SampleOrder
from mae_dist.train.checkpoint import step_of
from mae_dist.train.schedule import Plan

EPS, HEAD_STD, BN_MOMENTUM, TRUST = 1e-6, 0.01, 0.1, 0.001
CHUNK = 4096  # rows classified at once


@dataclass
class Heads:
    """H linear layers on normalised features."""

    weight: Tensor
    """(H, C, D)."""
    bias: Tensor
    """(H, C)."""
    mean: Tensor
    """(D,): running statistics of the features, as BatchNorm keeps them."""
    variance: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Normalised features (B, D) to (B, H, C)."""
        return (x @ self.weight.flatten(0, 1).T).unflatten(1, self.bias.shape) + self.bias

    def accuracy(self, features: Tensor, labels: Tensor, world: World) -> Tensor:
        """Share of all rows that each head classifies rightly, (H,) float64; ranks share the work."""
        right = torch.zeros(len(self.bias), dtype=torch.int64, device=features.device)
        mine = features[world.rank :: world.size], labels[world.rank :: world.size]
        for rows, truth in zip(mine[0].split(CHUNK), mine[1].split(CHUNK), strict=True):
            x = (rows - self.mean) * (self.variance + EPS).rsqrt()
            right += (self.logits(x).argmax(2) == truth[:, None]).sum(0)
        return world.sum(right).double() / len(features)


def first_weight(dim: int, num_classes: int, seed: int) -> Tensor:
    """(C, D), as the official code begins; the bias begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.trunc_normal_(torch.empty(num_classes, dim), std=HEAD_STD, generator=generator)


def first_heads(count: int, dim: int, num_classes: int, seed: int, device: torch.device) -> Heads:
    """All begin with the same weights, as each would alone."""
    weight = first_weight(dim, num_classes, seed).to(device)
    zeros = torch.zeros(count, num_classes, device=device)
    statistics = torch.zeros(dim, device=device), torch.ones(dim, device=device)
    return Heads(weight.expand(count, -1, -1).clone(), zeros, *statistics)


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    config: LinearConfig,
    seed: int,
    world: World,
) -> Heads:
    """Train a head for each (blr, weight decay) by LARS: features (N, D) float32, labels (N,) int64. Collective."""
    t, optim, batch = config.train, config.optim, config.train.global_batch_size
    device, count = features.device, len(features)
    plans = [Plan(t, optim, blr * batch / 256, count) for blr, _ in settings]
    decay = torch.tensor([wd for _, wd in settings], device=device)[:, None, None]
    heads = first_heads(len(settings), features.shape[1], num_classes, seed, device)
    moments = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    order = SampleOrder([count], seed)
    for k in range(plans[0].total):
        ids = torch.from_numpy(order.lookup(range(k * batch + world.rank, (k + 1) * batch, world.size)).id).to(device)
        rows, truth = features[ids], labels[ids]
        mean = world.sum(rows.sum(0)) / batch
        variance = world.sum((rows - mean).square().sum(0)) / batch
        heads.mean.lerp_(mean, BN_MOMENTUM)
        heads.variance.lerp_(variance * batch / (batch - 1), BN_MOMENTUM)
        x = (rows - mean) * (variance + EPS).rsqrt()
        error = heads.logits(x).softmax(2) - F.one_hot(truth, num_classes)[:, None]  # (B, H, C), of cross-entropy
        gradient = world.sum((error.flatten(1).T @ x).unflatten(0, heads.bias.shape)) / batch
        update = gradient + decay * heads.weight
        update *= trust(heads.weight, update, TRUST, (1, 2))
        lr = torch.tensor([plan.lr(k) for plan in plans], device=device)
        moments[0].mul_(optim.momentum).add_(update)
        moments[1].mul_(optim.momentum).add_(world.sum(error.sum(0)) / batch)
        heads.weight.sub_(lr[:, None, None] * moments[0])
        heads.bias.sub_(lr[:, None] * moments[1])
    return heads


@dataclass(frozen=True)
class Best:
    """What a sweep found."""

    test: float
    """Accuracy on the test images of the chosen setting, trained on all labels it may use."""
    held_out: float
    blr: float
    weight_decay: float


def held_out(labels: Ints, share: float, seed: int) -> Ints:
    """The places among training labels (N,) of those that choose the best. Raises UserError where those are all."""
    places = choose(labels, share, None, seed + 1)
    if len(places) == len(labels):
        raise UserError(
            f"sweep: {len(labels)} training labels in {len(np.unique(labels))} classes; sweep.held_out {share:g} takes "
            "at least one a class to choose the best, and leaves none to train on: write --per-class 2 or more, a "
            "larger --fraction, or a smaller --sweep.held_out"
        )
    return places


def choose_and_train(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, config: LinearConfig, seed: int,
    world: World,
) -> Best:  # fmt: skip
    """Sweep on a part of `train` (features, labels), choose on the rest of it, train on all, and look at `test`."""
    settings = [(blr, wd) for blr in config.sweep.blrs for wd in config.sweep.weight_decays]
    features, labels = train
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.from_numpy(held_out(labels.cpu().numpy(), config.sweep.held_out, seed))] = True
    held = held.to(labels.device)
    heads = train_heads(features[~held], labels[~held], num_classes, settings, config, seed, world)
    scores = heads.accuracy(features[held], labels[held], world)
    best = int(scores.argmax())
    final = train_heads(features, labels, num_classes, settings[best : best + 1], config, seed, world)
    return Best(float(final.accuracy(*test, world)), float(scores[best]), *settings[best])


def sweep(pretrained: Pretrained, config: LinearConfig) -> int:
    """`mae-dist linear RUN --sweep` on all the processes of this world."""
    world = World.join(config.train.device)
    try:
        merged = configs.Config(model=pretrained.config.model, data=config.data, train=config.train)
        train, test, num_classes = labelled_sources(merged)
        parts = [subset(train, config.labels.fraction, config.labels.per_class, seed) for seed in config.sweep.seeds]
        least = min(config.sweep.blrs) * config.train.global_batch_size / 256
        for part, seed in zip(parts, config.sweep.seeds, strict=True):
            labels = labels_of(part)
            few = len(labels) - len(held_out(labels, config.sweep.held_out, seed))
            Plan(config.train, config.optim, least, few).check()  # both raise before anything is made
        kinds = ("untrained",) if config.network.init == "none" else config.sweep.kinds
        pool, table = config.network.pool, dict[str, list[Best]]()
        for kind in kinds:
            unseen = extract(kind, pool, pretrained, test, merged, world).all(world.device)
            table[kind] = []
            for part, seed in zip(parts, config.sweep.seeds, strict=True):
                seen = extract(kind, pool, pretrained, part, merged, world).all(world.device)
                table[kind].append(choose_and_train(seen, unseen, num_classes, config, seed, world))
        if world.is_main:
            print(as_text(table, config))
            log(table, pretrained, config, asked(kinds, pool, pretrained, (train, test), merged))
        return 0
    finally:
        world.leave()


def log(table: dict[str, list[Best]], pretrained: Pretrained, config: LinearConfig, features: dict) -> None:
    """A run of its own, named by its settings and by what its features depend on."""
    params = {key: value for key, value in configs.flat(config) if key.split(".")[0] not in ("track", "train")}
    params |= {key: getattr(config.train, key) for key in ("global_batch_size", "epochs", "steps", "precision")}
    step = step_of(pretrained.checkpoint)
    run_dir = Path(config.train.runs_dir) / name_of("sweep", step, params | features)
    with logged(run_dir, pretrained, config.track, {"step": 0, "params": params}) as journal:
        metrics = {metric("linear", kind): sum(b.test for b in row) / len(row) for kind, row in table.items()}
        journal.write({"kind": "metrics", "step": step, "metrics": metrics})


def as_text(table: dict[str, list[Best]], config: LinearConfig) -> str:
    per_class = config.labels.per_class
    title = "linear probe, " + (f"{per_class} labels a class" if per_class else f"{config.labels.fraction:.0%} labels")
    rows = [f"{title:<36}{'test':>8}{'held out':>10}   blr, weight decay chosen"]
    for kind, found in table.items():
        test, held_out = (sum(values) / len(found) for values in ([b.test for b in found], [b.held_out for b in found]))
        chosen = "; ".join(f"{b.blr:g}, {b.weight_decay:g}" for b in found)
        rows.append(f"{kind:<36}{test:8.1%}{held_out:10.1%}   {chosen}")
    return "\n".join(rows)
