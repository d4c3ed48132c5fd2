"""Fine-tuning the whole encoder by the paper's recipe (appendix A.1, table 9), with timm's parts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm import optim as timm_optim
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_dist.data import Batch
from mae_dist.engine import World
from mae_dist.errors import UserError
from mae_dist.evaluate.augment import Mix, finetune_views
from mae_dist.evaluate.classifier import classifier
from mae_dist.evaluate.learner import Learner
from mae_dist.evaluate.options import FinetuneConfig, FinetuneOptim
from mae_dist.evaluate.supervised import load, train


def layer_groups(vit: VisionTransformer, optim: FinetuneOptim) -> list[dict]:
    """timm's parameter groups: lr_scale is layer_decay ** (depth + 1 - block), 0 for embeddings, 1 for the head."""
    no_decay: Any = vit.no_weight_decay()
    return timm_optim.param_groups_layer_decay(  # type: ignore[attr-defined]
        vit, optim.weight_decay, no_decay, layer_decay=optim.layer_decay
    )


class Finetune(Learner):
    """A timm ViT with a head, all of it trained."""

    def __init__(self, vit: VisionTransformer, config: FinetuneConfig, world: World, num_classes: int, accumulate: int):
        optim, self.seed = config.optim, config.train.seed
        vit.to(world.device)
        optimizer = torch.optim.AdamW(layer_groups(vit, optim), lr=0.0, betas=optim.betas, fused=True)
        super().__init__(vit, optimizer, world, config.train.precision, accumulate, optim.clip_grad, optim.ema)
        self.vit: Any = vit
        self.ddp: nn.Module = vit
        if world.size > 1:
            self.ddp = DistributedDataParallel(vit, gradient_as_bucket_view=True, static_graph=accumulate == 1)
        self.mix = Mix(config.augment, num_classes, self.seed)
        mixed = self.mix.mixup is not None
        if mixed and config.train.global_batch_size // world.size // accumulate % 2:
            raise UserError(
                "augment: mixup and cutmix pair images, so a micro-batch must be even (train.micro_batch_size)"
            )
        self.criterion = SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(config.augment.smoothing)

    def forward_backward(self, images: Tensor, batch: Batch, last: bool) -> None:
        self.model.train()
        self.vit.coins.throw(self.seed, batch.epochs, batch.ids, 2 * len(self.vit.blocks))
        images, targets = self.mix(images, batch.labels, batch.epochs, batch.ids)
        if isinstance(self.ddp, DistributedDataParallel):
            self.ddp.require_backward_grad_sync = last
        with self.autocast:
            logits = self.ddp(images)
        loss = self.criterion(logits.float(), targets) / self.accumulate
        self.update.scaled(loss).backward()

    def predict(self, images: Tensor) -> Tensor:
        model = self.evaluated.eval()
        with self.autocast:
            return model(images)


def finetune(arguments: Sequence[str]) -> int:
    """`mae-dist finetune RUN ...` on all the processes of this world."""
    pretrained, config = load(FinetuneConfig, "finetune", arguments, batch=1024, epochs=100)

    def make(world: World, num_classes: int, accumulate: int) -> Finetune:
        vit = classifier(pretrained, config.network, num_classes, config.train.seed)
        return Finetune(vit, config, world, num_classes, accumulate)

    views = partial(finetune_views, data=config.data, augment=config.augment, seed=config.train.seed)
    return train(pretrained, config, make, views)
