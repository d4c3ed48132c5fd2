"""The last yard of every step, the same for all engines: loss scaling, clipping and skipping, on the device.

All three are handed to the optimizer (fused AdamW, LARS) as one divisor and one flag: no pass over the gradients beyond
the norm, no waiting for the device, and an update that is skipped leaves weights, moments and counters as they are, bit
for bit.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mae_dist.engine.base import Precision, Shapes, StepResult, Trainable
from mae_dist.engine.optim import OptimizerConfig
from mae_dist.engine.world import World
from mae_dist.errors import UserError

AVERAGE = "ema"
FIRST_SCALE, GROW_AFTER = 2.0**16, 2000  # of the fp16 loss: doubled after so many good steps, halved on overflow


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 and fp16 run under autocast with float32 weights."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile would find no compiler at the first step (inductor's; on CUDA Triton's)."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
            return
        except (InvalidCxxCompiler, OSError):
            needed = "a C++ compiler (g++, or the one that CXX names)"
    else:
        given = os.environ.get("CC")
        if any(map(shutil.which, [given] if given else ["gcc", "clang", "cc"])):
            return
        needed = "a C compiler (gcc, clang, or the one that CC names)"
    raise UserError(f"engine.compile: needs {needed}, and finds none here; install one, or leave it out")


class Update:
    """One update after the other: collects the loss, arms the optimizer, counts."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World, clip_grad: float | None, precision: Precision):
        self.optimizer: Any = optimizer
        self.world, self.clip_grad = world, clip_grad
        self.loss = torch.zeros((), device=world.device)
        self.bad = torch.ones((), device=world.device)
        self.optimizer.found_inf = self.bad  # nothing moves unless armed
        self.veto: Tensor | None = None  # () bool: of the next update
        self.done = torch.zeros((), device=world.device)
        self.loss_scale = torch.full((), FIRST_SCALE, device=world.device) if precision == "fp16" else None
        self.good_steps = torch.zeros((), device=world.device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Note the loss of a micro-batch, already divided by their number; returns what to go backward from."""
        self.loss += loss.detach()
        return loss if self.loss_scale is None else loss * self.loss_scale

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # timm's: a layer's share

    def arm(self, norm: Tensor) -> Tensor:
        """Tell the optimizer what its next step does, from the norm of the reduced gradients.

        Returns the norm without loss scale. All ranks agree in `bad`.
        """
        scale = 1.0 if self.loss_scale is None else self.loss_scale
        norm = norm / scale
        finite = norm.isfinite() & self.loss.isfinite()
        self.bad = (~finite if self.veto is None else ~finite | self.veto).float()
        self.world.max(self.bad)
        clip = 1.0 if self.clip_grad is None else (norm / self.clip_grad).clamp(min=1.0)
        # The optimizer divides the gradients by grad_scale, and changes nothing when found_inf is 1.
        divisor = scale * clip
        self.optimizer.grad_scale = divisor if torch.is_tensor(divisor) else None
        self.optimizer.found_inf = self.bad
        return norm

    def result(self, norm: Tensor) -> StepResult:
        """Count what was done and begin anew."""
        self.done = self.done + 1 - self.bad
        if self.loss_scale is not None:
            self.good_steps = torch.where(self.bad > 0, 0.0, self.good_steps + 1)
            grow = self.good_steps >= GROW_AFTER
            self.loss_scale = self.loss_scale * torch.where(self.bad > 0, 0.5, torch.where(grow, 2.0, 1.0))
            self.good_steps = torch.where(grow, 0.0, self.good_steps)
        result = StepResult(self.loss, norm, self.bad)
        self.loss = torch.zeros_like(self.loss)
        return result


class Updating:
    """What every engine has: the model's state by name, an optimizer, an `update`, a moving average if asked for.

    `piece`: what of a parameter the optimizer of this rank works on.
    """

    average: dict[str, Tensor]
    """This rank's pieces of the moving average of the trained parameters, by name; empty: there is none."""

    def __init__(
        self,
        module: Trainable,
        world: World,
        optim: OptimizerConfig,
        precision: Precision,
        accumulate: int,
        piece: Callable[[Tensor], Tensor] = lambda parameter: parameter,
    ):
        self.world, self.accumulate = world, accumulate
        self.autocast = autocast(world.device, precision)
        self.model: Any = module.network
        self.tensors: dict[str, Any] = self.model.state_dict(keep_vars=True)
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.entry = optim.optimizer(self.model)
        self.trained: list[Any] = [p for group in self.entry.groups for p in group["params"]]
        self.pieces = {id(p): piece(p) for p in self.trained}
        groups = [group | {"params": [self.pieces[id(p)] for p in group["params"]]} for group in self.entry.groups]
        self.optimizer: Any = self.entry.make(groups)
        self.update = Update(self.optimizer, world, optim.clip_grad, precision)
        self.decay = optim.ema
        self.average = {} if self.decay is None else {name: p.detach().clone() for name, p in self._followed()}
        self.optimizer_state = (*self.entry.state_names, *([AVERAGE] if self.average else []))

    def _followed(self) -> Iterator[tuple[str, Tensor]]:
        """The pieces that the moving average follows, by name."""
        return ((name, self.pieces[id(t)]) for name, t in self.tensors.items() if id(t) in self.pieces)

    def finish(self, norm: Tensor) -> StepResult:
        """After the optimizer's step: move the average, but not after an update that was skipped; count."""
        if self.decay is not None:
            weight = (1 - self.decay) * (1 - self.update.bad)
            for name, now in self._followed():
                self.average[name].lerp_(now, weight)
        return self.update.result(norm)

    def kept(self, name: str) -> dict[str, Tensor]:
        """This rank's pieces of what is kept of a parameter, by the names of `optimizer_state`."""
        state = self.optimizer.state.get(self.pieces.get(id(self.tensors[name])), {})
        held = {key: state[key] for key in self.entry.state_names if key in state}
        return held | ({AVERAGE: self.average[name]} if name in self.average else {})

    @torch.no_grad()
    def keep(self, name: str, pieces: dict[str, Tensor]) -> None:
        """The opposite of `kept`: take this rank's pieces, on its device. What there is not of a name begins anew."""
        piece = self.pieces.get(id(self.tensors[name]))
        if piece is None:
            return
        if name in self.average:
            self.average[name].copy_(pieces.get(AVERAGE, piece))
        named = {key: pieces[key] for key in self.entry.state_names if key in pieces}
        if len(named) == len(self.entry.state_names):
            self.optimizer.state[piece] = self.entry.state(named, self.update.done)

    @property
    def loss(self) -> Tensor:
        return self.update.loss

    def counters(self) -> dict[str, Tensor]:
        update = self.update
        counters = {"updates": update.done}
        if update.loss_scale is not None:
            counters |= {"loss_scale": update.loss_scale, "good_steps": update.good_steps}
        return counters

    def set_counters(self, counters: dict[str, Tensor]) -> None:
        update = self.update
        counters = {name: value.to(update.world.device) for name, value in counters.items()}
        update.done = counters["updates"]
        if update.loss_scale is not None:
            update.loss_scale = counters.get("loss_scale", update.loss_scale)
            update.good_steps = counters.get("good_steps", update.good_steps)
