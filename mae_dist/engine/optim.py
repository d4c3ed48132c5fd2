"""What updates the parameters: groups, an optimizer, and the names of what it keeps. A new one is one file more.

The optimizer divides the gradients by `grad_scale` and changes nothing where `found_inf` is 1, as torch's fused ones
do; `Update` sets both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mae_dist.ranges import check_numbers

LEARNING = {
    "blr": "[0, 1e6]", "lr": "[0, 1e6]", "min_lr": "[0, 1e6]", "warmup_epochs": "[0, 1e9]", "weight_decay": "[0, 1e3]",
}  # fmt: skip


@dataclass(frozen=True)
class Optimizer:
    """How the parameters of a model are updated."""

    groups: list[dict]
    """Trained parameters with their options, as torch's optimizers take them."""
    make: Callable[[list[dict]], torch.optim.Optimizer]
    state_names: tuple[str, ...]
    """Of what is kept of each parameter, of its shape."""
    elementwise: bool = True
    """Each number is updated by itself, so that a parameter may be cut anywhere. Else the optimizer has an attribute
    `whole(parameter, piece)`, which an engine that cuts parameters sets: it puts together the ranks' pieces."""
    counter: str | None = None
    """The name under which it counts the updates of a parameter too."""

    def state(self, named: Mapping[str, Tensor], updates: Tensor) -> dict[str, Tensor]:
        """What it keeps of a parameter after so many updates, from the tensors of a checkpoint."""
        return {**named, **({self.counter: updates.clone()} if self.counter else {})}


class LearningRate:
    """Of options with `blr` and `lr`."""

    def peak_lr(self, global_batch_size: int) -> float:
        options: Any = self
        return options.blr * global_batch_size / 256 if options.lr is None else options.lr


class OptimizerConfig(Protocol):
    """What an engine needs of the options of an optimizer."""

    @property
    def clip_grad(self) -> float | None: ...
    @property
    def ema(self) -> float | None: ...

    def optimizer(self, model: nn.Module) -> Optimizer: ...


def adamw(groups: list[dict], betas: tuple[float, float]) -> Optimizer:
    make: Any = partial(torch.optim.AdamW, lr=0.0, betas=betas, fused=True)
    return Optimizer(groups, make, ("exp_avg", "exp_avg_sq"), counter="step")


def layer_groups(vit: Any, weight_decay: float, layer_decay: float) -> list[dict]:
    """timm's parameter groups: lr_scale is layer_decay ** (depth + 1 - block), 0 for embeddings, 1 for the head."""
    from timm import optim

    group: Any = optim.param_groups_layer_decay  # type: ignore[attr-defined]
    return group(vit, weight_decay, vit.no_weight_decay(), layer_decay=layer_decay)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: those of one dimension are not decayed, all others (tokens too) are.

    As timm 0.3.2 grouped them for the paper's code.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class OptimConfig(LearningRate):
    """AdamW with warm-up and a cosine to `min_lr` (paper appendix A.1)."""

    blr: float = 1.5e-4
    """Base learning rate: the peak is blr * global_batch_size / 256."""
    lr: float | None = None
    """Peak learning rate; replaces the one from `blr`."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 40.0
    """Epochs in which the learning rate rises from 0 to its peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the moving averages of the gradient and of its square."""
    weight_decay: float = 0.05
    """For weights and tokens; biases and norms (1-D) have none."""
    clip_grad: float | None = None
    """Largest gradient norm; null: gradients are not clipped, as in the paper."""

    @property
    def ema(self) -> None:
        """No moving average of the weights."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        return adamw(param_groups(model, self.weight_decay), self.betas)

    RANGES: ClassVar = LEARNING | {"betas": "[0, 1)", "clip_grad": "[1e-12, 1e12]"}

    def check(self) -> None:
        """Raise UserError naming what is out of its range."""
        check_numbers(self, "optim.")
