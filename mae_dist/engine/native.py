"""Plain torch.distributed: one replica a rank, gradients averaged by DDP while the backward pass goes on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_dist.engine.base import OptimConfig, Part, Precision, Shapes, StepResult, param_groups
from mae_dist.engine.world import World
from mae_dist.model import MAE

FIRST_SCALE, GROW_AFTER = 2.0**16, 2000  # of the fp16 loss: doubled after so many good steps, halved on overflow


class NativeEngine:
    """See `Engine`. bf16 and fp16 run under autocast with float32 weights; fp16 scales the loss.

    Unscaling, clipping and skipping are handed to fused AdamW as one divisor and one flag, both on the device: no pass
    over the gradients beyond the norm, and no waiting for the device.
    """

    def __init__(self, model: MAE, world: World, optim: OptimConfig, precision: Precision, accumulate: int = 1):
        self.model = model.to(world.device)
        self.world, self.accumulate, self.clip_grad = world, accumulate, optim.clip_grad
        groups = param_groups(model, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.tensors = self.model.state_dict(keep_vars=True)
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.updates = torch.zeros((), device=world.device)  # done when the optimizer was filled
        self.ddp: nn.Module = self.model
        if world.size > 1:
            self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, static_graph=accumulate == 1)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
        self.autocast: AbstractContextManager[Any] = (
            torch.autocast(world.device.type, dtype) if dtype else nullcontext()
        )
        scaled = precision == "fp16"
        self.loss_scale = torch.full((), FIRST_SCALE, device=world.device) if scaled else None
        self.good_steps = torch.zeros((), device=world.device)
        self.loss = torch.zeros((), device=world.device)

    def forward_backward(self, images: Tensor, noise: Tensor, last: bool) -> None:
        waits = nullcontext() if last or self.ddp is self.model else self.ddp.no_sync()  # type: ignore[operator]
        with waits:
            with self.autocast:
                loss = self.ddp(images, noise).loss / self.accumulate
            self.loss += loss.detach()
            (loss if self.loss_scale is None else loss * self.loss_scale).backward()

    @torch.no_grad()
    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        gradients = [p.grad for p in self.trained if p.grad is not None]
        scale = 1.0 if self.loss_scale is None else self.loss_scale
        norm = torch.nn.utils.get_total_norm(gradients) / scale
        finite = norm.isfinite() & self.loss.isfinite()
        bad = (~finite if veto is None else ~finite | veto).float()
        self.world.max(bad)
        clip = 1.0 if self.clip_grad is None else (norm / self.clip_grad).clamp(min=1.0)
        divisor = torch.as_tensor(scale * clip, device=norm.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Fused AdamW divides the gradients by grad_scale, and changes nothing when found_inf is 1.
        self.optimizer.grad_scale = divisor if torch.is_tensor(scale * clip) else None  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._adapt_scale(bad)
        result = StepResult(self.loss, norm, bad)
        self.loss = torch.zeros_like(self.loss)
        return result

    def _adapt_scale(self, bad: Tensor) -> None:
        if self.loss_scale is None:
            return
        self.good_steps = torch.where(bad > 0, 0.0, self.good_steps + 1)
        grow = self.good_steps >= GROW_AFTER
        factor = torch.where(bad > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.loss_scale = self.loss_scale * factor
        self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def replica(self) -> MAE:
        return self.model

    def gather(self, name: str) -> Part:
        tensor = self.tensors[name]
        state = self.optimizer.state.get(tensor)
        return Part(tensor, (state["exp_avg"], state["exp_avg_sq"]) if state else None)

    @torch.no_grad()
    def put(self, name: str, part: Part) -> None:
        tensor = self.tensors[name]
        tensor.copy_(part.weight)
        if part.moments:
            exp_avg, exp_avg_sq = (moment.to(tensor.device) for moment in part.moments)
            state = {"step": self.updates.clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            self.optimizer.state[tensor] = state

    def counters(self) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.trained[0])
        counters = {"updates": state["step"] if state else self.updates}
        if self.loss_scale is not None:
            counters |= {"loss_scale": self.loss_scale, "good_steps": self.good_steps}
        return counters

    def set_counters(self, counters: dict[str, Tensor]) -> None:
        counters = {name: value.to(self.world.device) for name, value in counters.items()}
        self.updates = counters["updates"]
        if self.loss_scale is not None:
            self.loss_scale = counters.get("loss_scale", self.loss_scale)
            self.good_steps = counters.get("good_steps", self.good_steps)
