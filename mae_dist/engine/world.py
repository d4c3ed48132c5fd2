"""The processes of a run and what they say to each other. Started alone, a process is a world of one."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from mae_dist.errors import UserError

START_TIMEOUT = timedelta(minutes=10)  # of a collective before the first update: compilers and first shards take long


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(device: str = "auto") -> "World":
        """Read torchrun's environment, choose this process's device ("auto", "cpu" or "cuda") and meet the others.

        Raises UserError when CUDA is asked for and absent, or a node has fewer GPUs than processes.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("train.device: cuda, but torch sees no CUDA device here; write cpu or auto")
        if device == "cpu" or not torch.cuda.is_available():
            chosen = torch.device("cpu")
        elif local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this node has no GPU of its own: torch sees {torch.cuda.device_count()}; "
                "start as many processes a node as it has GPUs (torchrun --nproc-per-node)"
            )
        else:
            chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=START_TIMEOUT, device_id=chosen if chosen.type == "cuda" else None)
        return World(rank, size, chosen)

    def connect(self) -> None:
        """Make sure that there is a process group, which DeepSpeed and FSDP2 want even for a process alone."""
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=START_TIMEOUT)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> range:
        """On the first rank of each node: the ranks of this node, for what is done once a node. Elsewhere: empty."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1)  # of torchrun or deepspeed
        return range(self.rank, self.rank + int(size) if first else self.rank)

    def set_timeout(self, seconds: float) -> None:
        """How long a collective waits for the others from now on, in every group: DeepSpeed makes its own.

        A rank that waited longer raises, or ends (NCCL).
        """
        if self.size > 1:
            change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch < 2.15
            for group in list(dist.distributed_c10d._world.pg_map):
                change(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """`values` added over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest of `values` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The `value` of rank `source`, on every rank. For small objects, outside the training steps."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, source, device=self.device)
        return box[0]

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
