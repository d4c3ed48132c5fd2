"""What `mae-dist linear` and `mae-dist finetune` can be told. The defaults are the paper's ViT-B recipes."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from mae_dist.data import DataConfig
from mae_dist.engine.lars import lars
from mae_dist.engine.optim import LEARNING, LearningRate, Optimizer, adamw, layer_groups
from mae_dist.engine.options import EngineConfig
from mae_dist.errors import UserError
from mae_dist.evaluate.features import Pool
from mae_dist.ranges import COUNT, SEED, check_numbers
from mae_dist.track import TrackConfig
from mae_dist.train.options import TrainConfig

RAND_AUGMENT = re.compile(r"rand(-((m|n|mmax|inc)\d+|(mstd|p)\d+(\.\d*)?|t(weights|3aw?)))*")


@dataclass(frozen=True)
class LabelsConfig:
    """Which training labels are used: a deterministic choice, the same number or share of every class."""

    fraction: float = 1.0
    """Share of the images of each class."""
    per_class: int | None = None
    """Images of each class, instead of a fraction."""
    seed: int = 0
    """Of the choice: the same seed, the same images."""

    RANGES: ClassVar = {"fraction": "(0, 1]", "per_class": COUNT, "seed": SEED}


@dataclass(frozen=True)
class NetworkConfig:
    """The network that is fine-tuned: the encoder and a linear head."""

    init: Literal["pretrained", "none"] = "pretrained"
    """none: the same network from scratch, for comparison."""
    pool: Pool = "mean"
    """The mean of the patch tokens, or the class token `cls`."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; less for those before it, nothing for the first."""

    img_size: int | tuple[int, int] | None = None
    """Pixels a side, or (height, width), of the images; null: as pretrained. Fixed positions are recomputed for the new
    grid, learned ones interpolated."""

    RANGES: ClassVar = {"drop_path": "[0, 1)", "img_size": "[1, 65536]"}


@dataclass(frozen=True)
class ProbeConfig:
    """The frozen encoder, and what of it the linear layer sees."""

    init: Literal["pretrained", "none"] = "pretrained"
    """none: an encoder that was never trained, for comparison."""
    pool: Pool = "cls"
    """The class token, as in the official code, or the mean of the patch tokens."""

    img_size: int | tuple[int, int] | None = None
    """Pixels a side, or (height, width), of the images; null: as pretrained. Fixed positions are recomputed for the new
    grid, learned ones interpolated."""

    RANGES: ClassVar = {"img_size": "[1, 65536]"}


@dataclass(frozen=True)
class AugmentConfig:
    """What training images go through besides crops and flips."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment as timm writes it; null: none."""
    erase: float = 0.25
    """Probability that a rectangle of an image becomes noise."""
    mixup: float = 0.8
    """Alpha of mixup; 0: none. Images of one micro-batch are paired, as timm does."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0: none. A batch is mixed or cut, each as often."""
    smoothing: float = 0.1
    """Label smoothing: the share of a label that is spread over all classes."""

    RANGES: ClassVar = {"erase": "[0, 1)", "mixup": "[0, 1e3]", "cutmix": "[0, 1e3]", "smoothing": "[0, 1)"}


@dataclass(frozen=True)
class FinetuneOptim(LearningRate):
    """AdamW with warm-up and a cosine, the learning rate lower for earlier blocks."""

    blr: float = 5e-4
    """Base learning rate: the peak is blr * global_batch_size / 256."""
    lr: float | None = None
    """Peak learning rate; replaces the one from `blr`."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 5.0
    """Epochs in which the learning rate rises from 0 to its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the moving averages of the gradient and of its square."""
    weight_decay: float = 0.05
    """For weights; biases, norms, class token and positions have none."""
    layer_decay: float = 0.65
    """Each block's learning rate, as a share of that of the block after it."""
    clip_grad: float | None = None
    """Largest gradient norm; null: gradients are not clipped, as in the paper."""
    ema: float | None = None
    """Decay of a moving average of the weights, such as 0.9999: the average is what is evaluated and saved beside."""

    RANGES: ClassVar = LEARNING | {
        "betas": "[0, 1)", "layer_decay": "(0, 1]", "clip_grad": "[1e-12, 1e12]", "ema": "(0, 1)",
    }  # fmt: skip

    def optimizer(self, model: nn.Module) -> Optimizer:
        return adamw(layer_groups(model, self.weight_decay, self.layer_decay), self.betas)


@dataclass(frozen=True)
class LinearOptim(LearningRate):
    """LARS with warm-up and a cosine."""

    blr: float = 0.1
    """Base learning rate: the peak is blr * global_batch_size / 256."""
    lr: float | None = None
    """Peak learning rate; replaces the one from `blr`."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 10.0
    """Epochs in which the learning rate rises from 0 to its peak."""
    momentum: float = 0.9
    """Share of the last update that goes on in the next."""
    weight_decay: float = 0.0
    """Added to the gradient of the weights, as a share of them."""

    RANGES: ClassVar = LEARNING | {"momentum": "[0, 1)"}

    def optimizer(self, model: nn.Module) -> Optimizer:
        return lars(model, self.weight_decay, self.momentum)

    @property
    def clip_grad(self) -> None:
        """The recipe has none."""

    @property
    def ema(self) -> None:
        """Nor a moving average."""


@dataclass(frozen=True)
class SweepConfig:
    """`mae-dist linear --sweep`: every blr with every weight decay at once, on features of centred crops."""

    blrs: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    """Base learning rates to try; they replace `optim.blr`."""
    weight_decays: tuple[float, ...] = (0.0, 1e-4)
    """Weight decays to try with each; they replace `optim.weight_decay`."""
    held_out: float = 0.2
    """Share of the training labels that chooses the best; the test images never do."""
    kinds: tuple[Literal["pretrained", "untrained", "pixels"], ...] = ("pretrained",)
    """Features to train on; those of an untrained encoder and the pixels are there to compare with."""
    seeds: tuple[int, ...] = (0,)
    """Of the choice of labels, the order and the heads' weights; the table has the mean."""

    RANGES: ClassVar = {"blrs": "(0, 1e6]", "weight_decays": "[0, 1e3]", "held_out": "(0, 1)", "seeds": SEED}

    def check(self) -> None:
        """Raise UserError where there is nothing to choose from."""
        for name in ("blrs", "weight_decays", "kinds", "seeds"):
            if not getattr(self, name):
                raise UserError(f"sweep.{name}: empty: write one or more, such as {list(getattr(SweepConfig, name))}")


@dataclass(frozen=True)
class FinetuneConfig:
    network: NetworkConfig = field(default_factory=NetworkConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def check(self, in_chans: int) -> None:
        """Raise UserError for everything that is wrong whatever the machine."""
        check_common(self, in_chans)
        if spec := self.augment.rand_augment:
            if in_chans not in (1, 3):
                raise UserError(f"augment.rand_augment: made for grey and RGB, not for {in_chans} channels; write null")
            from timm.data.auto_augment import rand_augment_transform  # slow to import

            try:
                assert RAND_AUGMENT.fullmatch(spec)  # timm passes over what else it does not know
                rand_augment_transform(spec, {"img_mean": (0, 0, 0), "translate_const": 1})
            except Exception:  # its asserts and lookups
                raise UserError(
                    f"augment.rand_augment: {spec}: not one of timm's; write rand-m9-mstd0.5-inc1, or null for none"
                ) from None


@dataclass(frozen=True)
class LinearConfig:
    network: ProbeConfig = field(default_factory=ProbeConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: LinearOptim = field(default_factory=LinearOptim)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def check(self, in_chans: int) -> None:
        """Raise UserError for everything that is wrong whatever the machine."""
        check_common(self, in_chans)
        self.sweep.check()
        if self.network.init == "none" and self.sweep.kinds not in (SweepConfig.kinds, ("untrained",)):
            kinds = ", ".join(self.sweep.kinds)
            raise UserError(f"sweep.kinds: {kinds}, but network.init none asks for untrained; leave one of them out")
        if self.train.global_batch_size < 2:
            raise UserError("train.global_batch_size: 1: the probe's BatchNorm needs two images or more; write 2")


def check_common(config: FinetuneConfig | LinearConfig, in_chans: int) -> None:
    for section in dataclasses.fields(config):
        check_numbers(getattr(config, section.name), f"{section.name}.")
    data, train, labels = config.data, config.train, config.labels
    data.check(in_chans)
    if labels.per_class is not None and labels.fraction != 1:
        raise UserError(f"labels.fraction: {labels.fraction}, but labels.per_class is set too; leave one of them out")
    train.check()
    config.engine.check()
    config.track.check()
    if data.val_shards is None:
        raise UserError("data.val_shards: evaluation needs held-out labelled shards: --data.val_shards SHARDS")
