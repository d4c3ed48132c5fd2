"""What the training loop may ask of an engine, whichever it is."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mae_dist.engine.world import World
from mae_dist.model import MAE, MAEConfig
from mae_dist.ranges import check_numbers

Precision = Literal["bf16", "fp16", "fp32"]
LEARNING = {
    "blr": "[0, 1e6]", "lr": "[0, 1e6]", "min_lr": "[0, 1e6]", "warmup_epochs": "[0, 1e9]", "weight_decay": "[0, 1e3]",
}  # fmt: skip


@dataclass(frozen=True)
class OptimConfig:
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

    def peak_lr(self, global_batch_size: int) -> float:
        return self.blr * global_batch_size / 256 if self.lr is None else self.lr

    RANGES: ClassVar = LEARNING | {"betas": "[0, 1)", "clip_grad": "[1e-12, 1e12]"}

    def check(self) -> None:
        """Raise UserError naming what is out of its range."""
        check_numbers(self, "optim.")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: those of one dimension are not decayed, all others (tokens too) are.

    As timm 0.3.2 grouped them for the paper's code.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class StepResult(NamedTuple):
    """What one update did; tensors stay on the device, so that asking costs nothing until they are read."""

    loss: Tensor
    """() float32: mean over this rank's samples of the global batch."""
    grad_norm: Tensor
    """() float32: of the averaged gradient, before clipping."""
    skipped: Tensor
    """() float32: 1 when the update was left out: a loss or gradient on some rank not finite, or a veto. Else 0."""


Shapes = Mapping[str, tuple[int, ...]]


class Part(NamedTuple):
    """One parameter and what AdamW knows of it, whole."""

    weight: Tensor
    moments: tuple[Tensor, Tensor] | None
    """exp_avg and exp_avg_sq; None for what is not trained, and before the first update."""


class Engine(Protocol):
    """The verbs of a training step. Clipping, finiteness and accumulation are inside; everything else is outside."""

    world: World
    shapes: Shapes
    """Of every entry of `MAE.state_dict()`, in its order, whole."""
    autocast: AbstractContextManager[Any]
    """The training precision, for evaluation."""

    @property
    def loss(self) -> Tensor:
        """() float32: mean over this rank's samples of the global batch under way."""
        ...

    def forward_backward(self, images: Tensor, noise: Tensor, last: bool) -> None:
        """One micro-batch: images (B, C, H, W) float32, noise (B, N) float32. Gradients are reduced on the `last`."""
        ...

    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        """Update with this learning rate, or skip on every rank when any rank's numbers are not finite.

        `veto`: () bool on the device; where it is true, the update is skipped too.
        """
        ...

    def replica(self) -> MAE:
        """The whole model on this rank, for evaluation without lockstep. Collective; good until the next step."""
        ...

    def gather(self, name: str) -> Part:
        """One entry of `shapes`, whole. Collective: every rank asks for the same names in the same order."""
        ...

    def put(self, name: str, part: Part) -> None:
        """The opposite of `gather`; `part` lies in host memory. Called after `set_counters`. Collective."""
        ...

    def counters(self) -> dict[str, Tensor]:
        """What else an update depends on, () float32 each: "updates" (not skipped) and, in fp16, the loss scale's."""
        ...

    def set_counters(self, counters: dict[str, Tensor]) -> None:
        """The opposite of `counters`; what another engine or precision has and this one has not is left out."""
        ...


def joined(config: MAEConfig, device: torch.device, weight: Callable[[str], Tensor]) -> MAE:
    """A plain model of its own memory, whose weights come from `weight(name)` one by one."""
    with torch.device("meta"):
        model = MAE(config)
    model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.copy_(weight(name))
    return model
