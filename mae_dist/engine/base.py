"""What the training loop may ask of an engine, whichever it is."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mae_dist.engine.world import World

Precision = Literal["bf16", "fp16", "fp32"]


class StepResult(NamedTuple):
    """What one update did; tensors stay on the device, so that asking costs nothing until they are read."""

    loss: Tensor
    """() float32: mean over this rank's samples of the global batch."""
    grad_norm: Tensor
    """() float32: of the averaged gradient, before clipping."""
    skipped: Tensor
    """() float32: 1 when the update was left out: a loss or gradient on some rank not finite, or a veto. Else 0."""


class Trainable(Protocol):
    """What an engine trains: a torch module whose forward returns something with a `loss`, () float32, of its inputs.

    The loss is the mean over the samples of a micro-batch.
    """

    @property
    def network(self) -> nn.Module:
        """The module itself, or the part of it that is trained and saved."""
        ...

    @property
    def blocks(self) -> list[nn.Module]:
        """Parts that are called as a whole, for FSDP2 to cut one by one."""
        ...

    def compile_blocks(self) -> None:
        """torch.compile for each block alone: all blocks of one width share what is compiled."""
        ...

    def __call__(self, *inputs: Tensor) -> Any: ...


Shapes = Mapping[str, tuple[int, ...]]


class ParamState(NamedTuple):
    """One entry of a model's state and what the optimizer keeps of it, whole."""

    weight: Tensor
    state: Mapping[str, Tensor]
    """By the optimizer's names, such as exp_avg; empty for what is not trained, and before the first update."""


class Engine(Protocol):
    """The verbs of a training step. Clipping, finiteness and accumulation are inside; everything else is outside."""

    world: World
    shapes: Shapes
    """Of every entry of the model's `state_dict()`, in its order, whole."""
    optimizer_state: tuple[str, ...]
    """The names of what the optimizer keeps of each trained parameter, of its shape."""
    autocast: AbstractContextManager[Any]
    """The training precision, for evaluation."""

    @property
    def loss(self) -> Tensor:
        """() float32: mean over this rank's samples of the global batch under way."""
        ...

    def forward_backward(self, *inputs: Tensor, last: bool) -> None:
        """One micro-batch, as the model's forward takes it. Gradients are reduced on the `last`."""
        ...

    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        """Update with this learning rate, or skip on every rank when any rank's numbers are not finite.

        `veto`: () bool on the device; where it is true, the update is skipped too.
        """
        ...

    def replica(self) -> Any:
        """The whole model on this rank, for evaluation without lockstep. Collective; good until the next step."""
        ...

    def gather(self, name: str) -> ParamState:
        """One entry of `shapes`, whole. Collective: every rank asks for the same names in the same order."""
        ...

    def scatter(self, name: str, whole: ParamState) -> None:
        """The opposite of `gather`; `whole` lies in host memory. Called after `set_counters`. Collective."""
        ...

    def counters(self) -> dict[str, Tensor]:
        """What else an update depends on, () float32 each: "updates" (not skipped) and, in fp16, the loss scale's."""
        ...

    def set_counters(self, counters: dict[str, Tensor]) -> None:
        """The opposite of `counters`; what another engine or precision has and this one has not is left out."""
        ...


def blank(model: nn.Module) -> Any:
    """A copy of a model without memory for its numbers."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def materialize(blank: nn.Module, device: torch.device, weight: Callable[[str], Tensor]) -> Any:
    """A plain model of its own memory, whose weights come from `weight(name)` one by one."""
    model = copy.deepcopy(blank).to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.copy_(weight(name))
    return model
