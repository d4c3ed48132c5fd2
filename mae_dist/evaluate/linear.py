"""The paper's linear probe (appendix A.1, table 10): one linear layer on the frozen encoder, trained by LARS."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dist.data import Batch
from mae_dist.engine import World
from mae_dist.errors import UserError
from mae_dist.evaluate.features import Extract, extractor
from mae_dist.evaluate.lars import LARS
from mae_dist.evaluate.learner import Learner
from mae_dist.evaluate.options import LinearConfig, SweepConfig
from mae_dist.evaluate.supervised import load, train
from mae_dist.evaluate.sweep import EPS, first_weight, sweep


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm without affine whose statistics are those of the global batch; for inputs without gradients."""

    def __init__(self, dim: int, world: World):
        super().__init__(dim, eps=EPS, affine=False)
        self.world = world

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        count = len(input) * self.world.size
        mean = self.world.sum(input.sum(0)) / count
        variance = self.world.sum((input - mean).square().sum(0)) / count
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        finite = (mean + variance).isfinite().all()  # a bad number moves nothing
        for kept, now in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
            kept.copy_(torch.where(finite, kept.lerp(now, self.momentum), kept))
        return (input - mean) * (variance + self.eps).rsqrt()


class LinearProbe(Learner):
    """A head on features that are never trained; `features`: normalised images (B, C, H, W) to (B, D)."""

    def __init__(
        self, features: Extract, dim: int, config: LinearConfig, world: World, num_classes: int, accumulate: int
    ):
        linear = nn.Linear(dim, num_classes)
        linear.load_state_dict(
            {"weight": first_weight(dim, num_classes, config.train.seed), "bias": torch.zeros(num_classes)}
        )
        head = nn.Sequential(GlobalBatchNorm(dim, world), linear).to(world.device)
        optim = config.optim
        optimizer = LARS(head.parameters(), weight_decay=optim.weight_decay, momentum=optim.momentum)
        super().__init__(head, optimizer, world, config.train.precision, accumulate)
        self.features = features
        self.waiting: list[tuple[Tensor, Tensor]] = []  # micro-batches of this global batch

    def forward_backward(self, images: Tensor, batch: Batch, last: bool) -> None:
        with torch.no_grad(), self.autocast:
            self.waiting.append((self.features(images).float(), batch.labels))
        if not last:
            return
        features, labels = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting = []
        self.model.train()
        self.update.scaled(F.cross_entropy(self.model(features), labels)).backward()
        for p in self.named:
            assert p.grad is not None
            self.world.sum(p.grad).div_(self.world.size)

    def predict(self, images: Tensor) -> Tensor:
        with torch.no_grad(), self.autocast:
            features = self.features(images).float()
        return self.model.eval()(features)


def linear(arguments: Sequence[str]) -> int:
    """`mae-dist linear RUN ...` on all the processes of this world; with --sweep many at once."""
    rest = [word for word in arguments if word != "--sweep"]
    pretrained, config = load(
        LinearConfig, "linear --sweep" if len(rest) < len(arguments) else "linear", rest, batch=16384, epochs=90
    )
    if len(rest) < len(arguments):
        if config.optim.lr is not None:
            raise UserError(f"optim.lr: {config.optim.lr}, but --sweep tries the rates of sweep.blrs; leave it out")
        return sweep(pretrained, config)
    if config.sweep != SweepConfig():
        raise UserError("sweep: set, but this is no sweep; add --sweep, or leave the section out")

    def make(world: World, num_classes: int, accumulate: int) -> LinearProbe:
        kind = "untrained" if config.network.init == "none" else "pretrained"
        model = pretrained.config.model
        with torch.no_grad():
            features = extractor(kind, config.network.pool, pretrained, world.device)
            blank = torch.zeros(1, model.in_chans, *model.height_width, device=world.device)
            dim = features(blank).shape[1]
        return LinearProbe(features, dim, config, world, num_classes, accumulate)

    return train(pretrained, config, make)
