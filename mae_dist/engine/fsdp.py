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

from mae_dist.engine.base import OptimConfig, Part, Precision, Shapes, StepResult, joined, param_groups
from mae_dist.engine.update import Update, Updating, autocast, fused_adamw
from mae_dist.engine.world import World
from mae_dist.model import MAE

# The ids that a pass returns are views, and nobody writes into them.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


class FSDPEngine(Updating):
    """See `Engine`. The optimizer works on plain tensors: this rank's pieces of the parameters."""

    def __init__(self, model: MAE, world: World, optim: OptimConfig, precision: Precision, accumulate: int = 1):
        world.connect()
        self.world, self.accumulate = world, accumulate
        self.autocast = autocast(world.device, precision)
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.model: Any = model.to(world.device)
        # The last decoder block is taken apart by MAE and never called, so it belongs to the model itself.
        for block in [*self.model.encoder.blocks, *self.model.dec_blocks[:-1]]:
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.model, mesh=self.mesh)
        self.tensors: dict[str, Any] = self.model.state_dict(keep_vars=True)
        groups = param_groups(self.model, optim.weight_decay)
        self.sharded: list[Any] = [p for group in groups for p in group["params"]]
        self.pieces = {id(p): p.detach().to_local() for p in self.sharded}
        pieces = [group | {"params": [self.pieces[id(p)] for p in group["params"]]} for group in groups]
        self.optimizer = fused_adamw(pieces, optim)
        self.update = Update(self.optimizer, world, optim.clip_grad, precision)

    def forward_backward(self, images: Tensor, noise: Tensor, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)
        with self.autocast:
            loss = self.model(images, noise).loss / self.accumulate
        self.update.scaled(loss).backward()

    @torch.no_grad()
    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        self.update.veto = veto
        for p in self.sharded:
            self.pieces[id(p)].grad = p.grad.to_local()
        local = torch.nn.utils.get_total_norm([piece.grad for piece in self.pieces.values()])
        norm = self.update.arm(self.world.sum(local.square()).sqrt())
        self.update.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        return self.update.result(norm)

    def replica(self) -> MAE:
        return joined(self.model.config, self.world.device, lambda name: self.tensors[name].detach().full_tensor())

    def gather(self, name: str) -> Part:
        tensor: Any = self.tensors[name].detach()
        piece = self.pieces.get(id(self.tensors[name]))
        state = self.optimizer.state.get(piece) if piece is not None else None
        return Part(
            tensor.full_tensor(),
            (self._join(tensor, state["exp_avg"]), self._join(tensor, state["exp_avg_sq"])) if state else None,
        )

    def _join(self, like: Any, piece: Tensor) -> Tensor:
        """The whole of what is cut as `like` is."""
        return DTensor.from_local(
            piece, self.mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()

    @torch.no_grad()
    def put(self, name: str, part: Part) -> None:
        tensor = self.tensors[name]
        tensor.to_local().copy_(self._cut(part.weight))
        if part.moments:
            exp_avg, exp_avg_sq = map(self._cut, part.moments)
            state = {"step": self.update.done.clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            self.optimizer.state[self.pieces[id(tensor)]] = state

    def _cut(self, tensor: Tensor) -> Tensor:
        """This rank's piece, on the device: rows, as FSDP2 deals them."""
        rows = tensor.chunk(self.world.size)
        mine = rows[self.world.rank] if self.world.rank < len(rows) else tensor[:0]
        return mine.to(self.world.device, copy=True, memory_format=torch.contiguous_format)
