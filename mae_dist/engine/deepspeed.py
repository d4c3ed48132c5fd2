"""DeepSpeed: ZeRO cuts the moments (stage 1), gradients too (2), weights too (3) over the ranks; 0 cuts nothing.

DeepSpeed reduces, cuts and gathers. Loss scaling, clipping and skipping are `Update`'s, as in every engine: DeepSpeed
is told of float32 without clipping, and calls our AdamW, which was handed divisor and flag. So a bad number moves
nothing at any stage and precision, also where DeepSpeed does not look. Its own checkpoints are not used.
"""

import logging
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mae_dist.engine.base import OptimConfig, Part, Precision, Shapes, StepResult, joined, param_groups
from mae_dist.engine.update import Update, Updating, autocast, fused_adamw
from mae_dist.engine.world import World
from mae_dist.errors import UserError
from mae_dist.model import MAE

BUCKET = 50_000_000  # numbers reduced at once: 200 MB of float32; DeepSpeed's own 2 GB are more than most ViTs have
PERSISTENT = 100_000  # stage 3 keeps smaller parameters whole, as DeepSpeed does


def load_deepspeed(world: World) -> Any:
    """The package, quiet. Raises UserError when it is not there."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for it even of a process alone
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine.name: deepspeed cannot be imported here ({error}); pip install 'mae_dist[deepspeed]', or write "
            "engine.name ddp or fsdp"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Without this, a CPU run compiles an operation that only inference calls: minutes, and a compiler, for nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def settings(stage: int, offload: bool, precision: Precision, accumulate: int) -> dict[str, Any]:
    """DeepSpeed's config."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": PERSISTENT,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # its default is 1.0
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        # Weights stay float32; gradients of matrices, and at stage 3 the matrices, travel as bf16.
        "torch_autocast": {"enabled": precision == "bf16" and stage > 0, "dtype": "bfloat16"},
    }


class LossOf(nn.Module):
    """What DeepSpeed wraps. Its forward pass switches off an autocast around it, so autocast is inside."""

    def __init__(self, model: MAE, precision: AbstractContextManager[Any]):
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        with self.precision:
            return self.model(images, noise).loss


class DeepSpeedEngine(Updating):
    """See `Engine`."""

    def __init__(
        self,
        model: MAE,
        world: World,
        optim: OptimConfig,
        precision: Precision,
        accumulate: int = 1,
        stage: int = 2,
        offload: bool = False,
    ):
        deepspeed = load_deepspeed(world)
        from deepspeed import utils

        world.connect()
        self.utils: Any = utils
        self.gathered: Any = deepspeed.zero.GatheredParameters
        self.model = model.to(world.device)
        self.world, self.accumulate, self.stage, self.offload = world, accumulate, stage, offload
        self.autocast = autocast(world.device, precision)
        self.tensors: dict[str, Any] = self.model.state_dict(keep_vars=True)
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.optimizer = fused_adamw(param_groups(model, optim.weight_decay), optim)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.update = Update(self.optimizer, world, optim.clip_grad, precision)
        self.optimizer.register_step_pre_hook(self._before_update)
        self.armed = True  # stage 3 begins with a step on zeros: unarmed, it would count
        self.norm = torch.zeros((), device=world.device)
        self.engine: Any = deepspeed.initialize(
            model=LossOf(self.model, autocast(world.device, precision)),
            optimizer=self.optimizer,
            config=settings(stage, offload, precision, accumulate),
        )[0]
        self._begin_moments()

    def forward_backward(self, images: Tensor, noise: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(images, noise) / self.accumulate
        self.engine.backward(self.update.scaled(loss), scale_wrt_gas=False)

    @torch.no_grad()
    def step(self, lr: float, veto: Tensor | None = None) -> StepResult:
        self.update.veto = veto
        self.update.set_lr(lr)
        self.armed = False
        self.engine.step()
        if not self.armed:  # DeepSpeed itself found, on every rank, that the norm of the gradient is not finite
            self.norm, self.update.bad = torch.full_like(self.norm, torch.inf), torch.ones_like(self.norm)
            self.armed = True
        return self.update.result(self.norm)

    def _before_update(self, *_: Any) -> None:
        """Called before each step of AdamW, of which DeepSpeed makes one a parameter group; the first one arms all."""
        if self.armed:
            return
        self.armed = True
        if self.stage == 0:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        else:
            norm = self.engine.optimizer._global_grad_norm.to(self.world.device, torch.float32).reshape(())
        self.norm = self.update.arm(norm)
        if self.offload:
            scale: Tensor | None = self.optimizer.grad_scale  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None if scale is None else scale.cpu()  # type: ignore[attr-defined]
            self.optimizer.found_inf = self.update.bad.cpu()  # type: ignore[attr-defined]

    def replica(self) -> MAE:
        return self.model if self.stage < 3 else joined(self.model.config, self.world.device, self._weight)

    def _weight(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if self.stage < 3:
            return tensor.detach()
        with self.gathered([tensor]):
            return tensor.detach().clone()

    def gather(self, name: str) -> Part:
        tensor, weight = self.tensors[name], self._weight(name)
        if not tensor.requires_grad:
            return Part(weight, None)
        if self.stage == 0:
            state = self.optimizer.state[tensor]
            return Part(weight, (state["exp_avg"], state["exp_avg_sq"]))
        whole = self.utils.safe_get_full_optimizer_state
        return Part(weight, (whole(tensor, "exp_avg"), whole(tensor, "exp_avg_sq")))

    @torch.no_grad()
    def put(self, name: str, part: Part) -> None:
        tensor, weight = self.tensors[name], part.weight.to(self.world.device)
        if self.stage < 3:
            tensor.copy_(weight)
        else:
            with self.gathered([tensor], modifier_rank=0):
                tensor.copy_(weight)
        if not tensor.requires_grad:
            return
        self._set(tensor, weight, None)
        for key, moment in zip(("exp_avg", "exp_avg_sq"), part.moments or (), strict=False):
            self._set(tensor, moment.to(self.world.device), key)

    def _set(self, tensor: Any, value: Tensor, key: str | None) -> None:
        """Write AdamW's copy of a parameter (key None) or one of its moments: this rank's part of the whole `value`."""
        if self.stage == 0:
            if key:
                self.optimizer.state[tensor][key].copy_(value)
        elif self.stage < 3:
            utils = self.utils
            setter = utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param
            setter(tensor, value, *([key] if key else []))
        else:
            size, utils = tensor.ds_tensor.numel(), self.utils
            padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            setter = utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param
            setter(tensor, padded[size * self.world.rank :][:size], *([key] if key else []))

    def _begin_moments(self) -> None:
        """AdamW's state, its moments zero, for every tensor that it works on; to be filled by `put`.

        Made here because DeepSpeed makes it late and, with two parameter groups, links only the first one's.
        """
        zero: Any = self.engine.optimizer
        flat = self.trained
        if self.stage:
            flat = zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat
        for tensor in flat:
            moments = {key: torch.zeros_like(tensor, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            step = self.update.done.to(tensor.device, copy=True)
            self.optimizer.state[tensor] = {"step": step} | moments
        if self.stage in (1, 2):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def set_counters(self, counters: dict[str, Tensor]) -> None:
        super().set_counters(counters)
        self._begin_moments()
