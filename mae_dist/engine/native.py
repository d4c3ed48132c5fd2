"""Plain torch.distributed: one replica a rank, gradients averaged by DDP while the backward pass goes on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from mae_dist.engine.base import OptimConfig, Part, Precision, Shapes, StepResult, param_groups
from mae_dist.engine.update import Update, Updating, autocast, fused_adamw
from mae_dist.engine.world import World
from mae_dist.model import MAE


class NativeEngine(Updating):
    """See `Engine`."""

    def __init__(
        self,
        model: MAE,
        world: World,
        optim: OptimConfig,
        precision: Precision,
        accumulate: int = 1,
        compress_gradients: bool = False,
    ):
        self.model = model.to(world.device)
        self.world, self.accumulate = world, accumulate
        self.autocast = autocast(world.device, precision)
        self.tensors = self.model.state_dict(keep_vars=True)
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.optimizer = fused_adamw(param_groups(model, optim.weight_decay), optim)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.update = Update(self.optimizer, world, optim.clip_grad, precision)
        self.ddp: Any = None
        if world.size > 1:
            static = accumulate == 1
            self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, static_graph=static)
            if compress_gradients:
                self.ddp.register_comm_hook(None, bf16_compress_hook)
        self.primed = self.ddp is None

    def forward_backward(self, images: Tensor, noise: Tensor, last: bool) -> None:
        if not self.primed:
            self._prime(images, noise)
        whole: nn.Module = self.ddp or self.model
        waits: AbstractContextManager[Any] = nullcontext() if last or self.ddp is None else self.ddp.no_sync()
        with waits:
            with self.autocast:
                loss = whole(images, noise).loss / self.accumulate
            self.update.scaled(loss).backward()

    def _prime(self, images: Tensor, noise: Tensor) -> None:
        """Throw away a process's first passes.

        DDP notes in which order gradients are ready and then cuts its buckets anew, which changes the order of addition
        over more than two ranks. Done before the first step, a resumed run is equal to the undisturbed one.
        """
        self.primed = True
        for _ in range(2 if self.ddp.static_graph else 1):  # a static graph's first pass only counts
            with self.autocast:
                loss = self.ddp(images, noise).loss
            loss.backward()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        self.update.veto = veto
        norm = self.update.arm(torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        self.update.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.update.result(norm)

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
            state = {"step": self.update.done.clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            self.optimizer.state[tensor] = state
