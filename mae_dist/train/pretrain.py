"""Pretraining: the Masked Autoencoder's own loss (paper section 3)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mae_dist.config import Config
from mae_dist.data import Source, open_sources
from mae_dist.data.loader import Batch
from mae_dist.engine import World
from mae_dist.model import MAE
from mae_dist.train.knn import IMAGES, KnnWatch
from mae_dist.train.objective import Evaluation, Setup
from mae_dist.train.run import run
from mae_dist.train.schedule import Plan
from mae_dist.train.validate import PICTURED, Validation


def pretrain(config: Config) -> int:
    """Pretrain on all the processes of this world; returns and raises what `run` does."""
    config.check()
    config = config.with_epoch_size()
    config = dataclasses.replace(config, data=config.data.absolute(), track=config.track.absolute())
    return run(Pretraining(config))


class Pretraining:
    """See `Objective`."""

    def __init__(self, config: Config):
        self.config, self.model = config, config.model

    def sources(self) -> tuple[Source, Source | None]:
        return open_sources(self.config.data, self.model.height_width, self.model.in_chans)

    def origin(self) -> dict[str, Any]:
        return {}

    def build(self, world: World, accumulate: int) -> MAE:
        torch.manual_seed(self.config.train.seed)
        return MAE(self.model)

    def passes(self, accumulate: int) -> int:
        return accumulate

    def make_views(self) -> None:
        return None

    def evaluations(self, setup: Setup) -> list[Evaluation]:
        self.validation = Validation(self.config, setup)
        return [self.validation, *([KnnWatch(self.config, setup)] if self.config.train.knn_every else [])]

    def num_evaluated(self, train: Source, held_out: Source | None) -> int:
        """The held-out images, or one picture's; and those that vote in k-NN."""
        voters = min(IMAGES, int(train.counts.sum())) if self.config.train.knn_every else 0
        return voters + (int(held_out.counts.sum()) if held_out else PICTURED)

    def inputs(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and the noise that masks them, (B, N) float32, keyed by (seed, epoch, sample)."""
        return images, self.model.noise(self.config.train.seed, batch.epochs, batch.ids)

    def trial(self, network: nn.Module) -> Tensor:
        return network(*self.validation.pictured_inputs()).loss

    def describe(self, plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
        model = self.model
        params = {
            "enc_name": model.enc_name,
            "mask_ratio": model.mask_ratio,
            "decoder": f"{model.dec_dim}x{model.dec_depth}",
            "norm_pix_loss": model.norm_pix_loss,
            "global_batch_size": plan.batch,
            "peak_lr": plan.peak_lr,
            "steps": plan.total,
            "seed": self.config.train.seed,
        }
        return params, {}
