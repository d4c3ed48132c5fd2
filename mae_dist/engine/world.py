"""The processes of a run and what they say to each other. Started alone, a process is a world of one."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore

from mae_dist.engine.rendezvous import call_the_roll, connect, is_loopback, serve, stay_on_loopback
from mae_dist.errors import UserError
from mae_dist.launched import Launch, launch

START_TIMEOUT = timedelta(minutes=10)  # of a collective before the first update: compilers and first shards take long


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(device: str = "auto") -> "World":
        """Read torchrun's environment, choose this process's device ("auto", "cpu" or "cuda") and meet the others.

        Raises UserError when CUDA is asked for and absent, a node has fewer GPUs than processes, the environment
        contradicts itself, or the others cannot be met where it says.
        """
        launched = launch()
        bound = os.environ.get("SLURM_GPUS_PER_TASK") == "1"  # srun shows each task its own GPU only
        local_rank = 0 if bound else launched.local_rank
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
        world = World(launched.rank, launched.size, chosen)
        if world.size > 1 and not dist.is_initialized():
            world._meet(launched)
        return world

    def _meet(self, launched: Launch) -> None:
        """Make the process group of all ranks."""
        host, port, cuda = launched.host, launched.port, self.device.type == "cuda"
        one_machine = launched.local_size == self.size
        if launched.local_size is None:  # Kubeflow told the pod of rank 0 that it was to be localhost
            one_machine = is_loopback(host) and "KUBERNETES_SERVICE_HOST" not in os.environ
        if one_machine:
            stay_on_loopback()
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's process has the store
        if self.rank == 0 and not agent:
            store = serve(host, port, START_TIMEOUT, one_machine)
        else:
            store = connect(host, port, START_TIMEOUT)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        call_the_roll(store, self.rank, self.size, f"{host}:{port}", attempt)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=PrefixStore(f"mae_dist/{attempt}", store),
            rank=self.rank,
            world_size=self.size,
            timeout=START_TIMEOUT,
            device_id=self.device if cuda else None,
        )

    def connect(self) -> None:
        """Make sure that there is a process group, which DeepSpeed and FSDP2 want even for a process alone."""
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            stay_on_loopback()
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=START_TIMEOUT)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> range:
        """On the first rank of each node: the ranks of this node, for what is done once a node. Elsewhere: empty."""
        launched = launch()
        return range(self.rank, self.rank + (launched.local_size or 1) if launched.local_rank == 0 else self.rank)

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
