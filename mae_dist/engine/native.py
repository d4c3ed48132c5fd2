"""Plain torch.distributed: one replica a rank, gradients averaged by DDP while the backward pass goes on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from mae_dist.engine.base import ParamState, Precision, StepResult, Trainable, blank, materialize
from mae_dist.engine.optim import OptimizerConfig
from mae_dist.engine.update import Updating
from mae_dist.engine.world import World


class NativeEngine(Updating):
    """See `Engine`."""

    def __init__(
        self,
        module: Trainable,
        world: World,
        optim: OptimizerConfig,
        precision: Precision,
        accumulate: int = 1,
        compress_gradients: bool = False,
    ):
        self.module: Any = module
        self.module.to(world.device)
        self.blank = blank(module.network)
        super().__init__(self.module, world, optim, precision, accumulate)
        self.ddp: Any = None
        if world.size > 1:
            static = accumulate == 1
            self.ddp = DistributedDataParallel(self.module, gradient_as_bucket_view=True, static_graph=static)
            if compress_gradients:
                self.ddp.register_comm_hook(None, bf16_compress_hook)
        self.primed = self.ddp is None

    def forward_backward(self, *inputs: Tensor, last: bool) -> None:
        if not self.primed:
            self._prime(inputs)
        whole = self.ddp or self.module
        waits: AbstractContextManager[Any] = nullcontext() if last or self.ddp is None else self.ddp.no_sync()
        with waits:
            with self.autocast:
                loss = whole(*inputs).loss / self.accumulate
            self.update.scaled(loss).backward()

    def _prime(self, inputs: tuple[Tensor, ...]) -> None:
        """Throw away a process's first passes.

        DDP notes in which order gradients are ready and then cuts its buckets anew, which changes the order of addition
        over more than two ranks. Done before the first step, a resumed run is equal to the undisturbed one.
        """
        self.primed = True
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        for _ in range(2 if self.ddp.static_graph else 1):  # a static graph's first pass only counts
            with self.autocast:
                loss = self.ddp(*inputs).loss
            loss.backward()
            self.optimizer.zero_grad(set_to_none=True)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        self.update.veto = veto
        norm = self.update.arm(torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        self.update.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.finish(norm)

    def replica(self) -> Any:
        if not self.average:
            return self.model
        return materialize(
            self.blank,
            self.world.device,
            lambda name: self.average[name] if name in self.average else self.tensors[name],
        )

    def gather(self, name: str) -> ParamState:
        return ParamState(self.tensors[name], self.kept(name))

    @torch.no_grad()
    def scatter(self, name: str, whole: ParamState) -> None:
        self.tensors[name].copy_(whole.weight)
        self.keep(name, {key: value.to(self.world.device) for key, value in whole.state.items()})
