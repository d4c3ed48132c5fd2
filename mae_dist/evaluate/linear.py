"""The paper's linear probe (appendix A.1, table 10): one linear layer on the frozen encoder, trained by LARS."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dist.data import Batch
from mae_dist.engine import World
from mae_dist.engine.update import autocast
from mae_dist.errors import UserError
from mae_dist.evaluate.features import extractor
from mae_dist.evaluate.finetune import Loss
from mae_dist.evaluate.options import LinearConfig, SweepConfig
from mae_dist.evaluate.supervised import Supervised, load
from mae_dist.evaluate.sweep import EPS, first_weight, sweep
from mae_dist.train.run import run


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


class Head(nn.Module):
    """Batch norm and a linear layer, and the loss of features (B, D) and labels (B,)."""

    def __init__(self, dim: int, num_classes: int, world: World, seed: int):
        super().__init__()
        linear = nn.Linear(dim, num_classes)
        linear.load_state_dict({"weight": first_weight(dim, num_classes, seed), "bias": torch.zeros(num_classes)})
        self.head = nn.Sequential(GlobalBatchNorm(dim, world), linear)

    @property
    def network(self) -> nn.Sequential:
        return self.head

    @property
    def blocks(self) -> list[nn.Module]:
        return []

    def compile_blocks(self) -> None:
        """Nothing: what costs time is the encoder, which is not trained."""

    def forward(self, features: Tensor, labels: Tensor) -> Loss:
        """In float32 whatever the encoder computes in."""
        with torch.autocast(features.device.type, enabled=False):
            return Loss(F.cross_entropy(self.head(features), labels))


class Probing(Supervised):
    """See `Objective`: the head alone is trained, on features of the frozen encoder."""

    config: LinearConfig

    @torch.no_grad()
    def build(self, world: World, accumulate: int) -> Head:
        kind = "untrained" if self.config.network.init == "none" else "pretrained"
        self.features = extractor(kind, self.config.network.pool, self.pretrained, world.device)
        blank = torch.zeros(1, self.model.in_chans, *self.model.height_width, device=world.device)
        dim, self.autocast = self.features(blank).shape[1], autocast(world.device, self.config.train.precision)
        self.waiting: list[tuple[Tensor, Tensor]] = []  # micro-batches of this global batch
        self.accumulate = accumulate
        return Head(dim, self.num_classes, world, self.config.train.seed)

    def passes(self, accumulate: int) -> int:
        """One: the statistics of its batch norm are those of the global batch."""
        return 1

    @torch.no_grad()
    def inputs(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        with self.autocast:
            self.waiting.append((self.features(images).float(), batch.labels))
        if len(self.waiting) < self.accumulate:
            return None
        features, labels = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting = []
        return features, labels

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(images).float()
        with torch.autocast(features.device.type, enabled=False):
            return network(features)


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
    return run(Probing(pretrained, config))
