"""The last yard of every step, the same for all engines: loss scaling, clipping and skipping, on the device.

All three are handed to the optimizer (fused AdamW, LARS) as one divisor and one flag: no pass over the gradients beyond
the norm, no waiting for the device, and an update that is skipped leaves weights, moments and counters as they are, bit
for bit.
"""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mae_dist.engine.base import OptimConfig, Precision, StepResult
from mae_dist.engine.world import World
from mae_dist.errors import UserError

FIRST_SCALE, GROW_AFTER = 2.0**16, 2000  # of the fp16 loss: doubled after so many good steps, halved on overflow


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 and fp16 run under autocast with float32 weights."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def fused_adamw(groups: list[dict], optim: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)


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


def compile_blocks(model: nn.Module) -> None:
    """torch.compile for each block alone: all blocks of one width share what is compiled."""
    parts: Any = model
    for block in [*parts.encoder.blocks, *parts.dec_blocks[:-1]]:
        block.compile()
    parts._last_block = torch.compile(parts._last_block)


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
    """What every engine has of its `update`."""

    update: Update

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
