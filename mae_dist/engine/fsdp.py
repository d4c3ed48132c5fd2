"""FSDP2: weights, gradients and moments are cut over the ranks, and each block is whole only while it works.

Weights stay float32 and travel so; bf16 and fp16 run under autocast inside, as with DDP, because FSDP2's own mixed
precision also rounds the residual stream and the pixels that the loss compares with.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mae_dist.engine.base import ParamState, Precision, StepResult, Trainable, blank, materialize
from mae_dist.engine.optim import OptimizerConfig
from mae_dist.engine.update import Updating
from mae_dist.engine.world import World

# The ids that a pass returns are views, and nobody writes into them.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


class FSDPEngine(Updating):
    """See `Engine`. The optimizer works on plain tensors: this rank's pieces of the parameters."""

    def __init__(
        self, module: Trainable, world: World, optim: OptimizerConfig, precision: Precision, accumulate: int = 1
    ):
        world.connect()
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.module: Any = module
        self.module.to(world.device)
        self.blank = blank(module.network)
        for block in module.blocks:
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.module, mesh=self.mesh)
        super().__init__(module, world, optim, precision, accumulate, local_piece)
        if not self.entry.elementwise:
            cut: dict[int, Any] = {id(self.pieces[id(p)]): p for p in self.trained}
            self.optimizer.whole = lambda parameter, piece: self._join(cut[id(parameter)], piece)

    def forward_backward(self, *inputs: Tensor, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)
        with self.autocast:
            loss = self.module(*inputs).loss / self.accumulate
        self.update.scaled(loss).backward()

    @torch.no_grad()
    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        self.update.veto = veto
        for p in self.trained:
            self.pieces[id(p)].grad = p.grad.to_local()
        local = torch.nn.utils.get_total_norm([piece.grad for piece in self.pieces.values() if piece.grad is not None])
        norm = self.update.arm(self.world.sum(local.square()).sqrt())
        self.update.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)
        return self.finish(norm)

    def replica(self) -> Any:
        return materialize(self.blank, self.world.device, self._evaluated)

    def _evaluated(self, name: str) -> Tensor:
        tensor = self.tensors[name].detach()
        return self._join(tensor, self.average[name]) if name in self.average else whole(tensor)

    def gather(self, name: str) -> ParamState:
        tensor: Any = self.tensors[name].detach()
        return ParamState(whole(tensor), {key: self._join(tensor, piece) for key, piece in self.kept(name).items()})

    def _join(self, like: Any, piece: Tensor) -> Tensor:
        """The whole of what is cut as `like` is."""
        return DTensor.from_local(
            piece, self.mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()

    @torch.no_grad()
    def scatter(self, name: str, whole: ParamState) -> None:
        tensor = self.tensors[name]
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(self._cut(whole.weight))
        else:  # a buffer
            tensor.copy_(whole.weight)
        self.keep(name, {key: self._cut(value) for key, value in whole.state.items()})

    def _cut(self, tensor: Tensor) -> Tensor:
        """This rank's piece, on the device: rows, as FSDP2 deals them."""
        rows = tensor.chunk(self.world.size)
        mine = rows[self.world.rank] if self.world.rank < len(rows) else tensor[:0]
        return mine.to(self.world.device, copy=True, memory_format=torch.contiguous_format)


def local_piece(parameter: Any) -> Tensor:
    return parameter.detach().to_local()


def whole(tensor: Any) -> Tensor:
    """A parameter that is cut, or a buffer, which every rank has."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
