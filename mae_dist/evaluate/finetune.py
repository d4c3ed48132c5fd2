"""Fine-tuning the whole encoder by the paper's recipe (appendix A.1, table 9), with timm's parts."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dist.data import Batch
from mae_dist.engine import World
from mae_dist.errors import UserError
from mae_dist.evaluate.augment import Mix, finetune_views
from mae_dist.evaluate.classifier import classifier
from mae_dist.evaluate.options import FinetuneConfig
from mae_dist.evaluate.supervised import Supervised, load
from mae_dist.train.objective import MakeViews
from mae_dist.train.run import run


class Loss(NamedTuple):
    loss: Tensor
    """() float32, mean over the images."""


class Classifier(nn.Module):
    """A timm ViT with a head, and the loss of images (B, C, H, W) and targets: labels (B,) or shares (B, classes)."""

    def __init__(self, vit: VisionTransformer, smoothing: float, mixed: bool):
        super().__init__()
        self.vit: Any = vit
        self.criterion = SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(smoothing)

    @property
    def network(self) -> VisionTransformer:
        return self.vit

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    def compile_blocks(self) -> None:
        for block in self.vit.blocks:
            block.compile()

    def forward(self, images: Tensor, targets: Tensor) -> Loss:
        return Loss(self.criterion(self.vit(images).float(), targets))


class Finetuning(Supervised):
    """See `Objective`: all of the encoder is trained, and a head."""

    config: FinetuneConfig

    def build(self, world: World, accumulate: int) -> Classifier:
        config = self.config
        self.mix = Mix(config.augment, self.num_classes, config.train.seed)
        mixed = self.mix.mixup is not None
        if mixed and config.train.global_batch_size // world.size // accumulate % 2:
            raise UserError(
                "augment: mixup and cutmix pair images, so a micro-batch must be even (train.micro_batch_size)"
            )
        vit: Any = classifier(self.pretrained, config.network, self.num_classes, config.train.seed)
        self.coins, self.branches = vit.coins, 2 * len(vit.blocks)
        return Classifier(vit, config.augment.smoothing, mixed)

    def make_views(self) -> MakeViews:
        config = self.config
        return partial(finetune_views, data=config.data, augment=config.augment, seed=config.train.seed)

    def inputs(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        self.coins.throw(self.config.train.seed, batch.epochs, batch.ids, self.branches)
        return self.mix(images, batch.labels, batch.epochs, batch.ids)

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        return network(images)


def finetune(arguments: Sequence[str]) -> int:
    """`mae-dist finetune RUN ...` on all the processes of this world."""
    pretrained, config = load(FinetuneConfig, "finetune", arguments, batch=1024, epochs=100)
    return run(Finetuning(pretrained, config))
