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

from mae_dist.engine.base import ParamState, Precision, StepResult, Trainable, blank, materialize
from mae_dist.engine.optim import OptimizerConfig
from mae_dist.engine.update import Updating, autocast
from mae_dist.engine.world import World
from mae_dist.errors import UserError

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

    def __init__(self, module: Any, precision: AbstractContextManager[Any]):
        super().__init__()
        self.module, self.precision = module, precision

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.precision:
            return self.module(*inputs).loss


class DeepSpeedEngine(Updating):
    """See `Engine`."""

    def __init__(
        self,
        module: Trainable,
        world: World,
        optim: OptimizerConfig,
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
        self.stage, self.offload = stage, offload
        whole: Any = module
        whole.to(world.device)
        self.blank = blank(module.network)
        super().__init__(module, world, optim, precision, accumulate)
        self._check(optim)
        self.optimizer.register_step_pre_hook(self._before_update)
        self.armed = True  # stage 3 begins with a step on zeros: unarmed, it would count
        self.norm = torch.zeros((), device=world.device)
        self.engine: Any = deepspeed.initialize(
            model=LossOf(module, autocast(world.device, precision)),
            optimizer=self.optimizer,
            config=settings(stage, offload, precision, accumulate),
        )[0]
        self._begin_moments()

    def _check(self, optim: OptimizerConfig) -> None:
        if self.stage and not self.entry.elementwise:
            raise UserError(
                f"engine.zero_stage: {self.stage} cuts parameters into pieces, and {type(self.optimizer).__name__} "
                "needs them whole; write engine.zero_stage 0, or engine.name ddp"
            )
        if self.stage == 3 and self.average:
            raise UserError(
                f"optim.ema: {optim.ema}: a moving average needs whole weights, which engine.zero_stage 3 cuts; write "
                "engine.zero_stage 2, or engine.name fsdp"
            )

    def forward_backward(self, *inputs: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(*inputs) / self.accumulate
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
        return self.finish(self.norm)

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
            scale: Tensor | None = self.optimizer.grad_scale
            self.optimizer.grad_scale = None if scale is None else scale.cpu()
            self.optimizer.found_inf = self.update.bad.cpu()

    def replica(self) -> Any:
        if self.stage < 3 and not self.average:
            return self.model
        return materialize(
            self.blank,
            self.world.device,
            lambda name: self.average[name] if name in self.average else self._weight(name),
        )

    def _weight(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if self.stage < 3:
            return tensor.detach()
        with self.gathered([tensor]):
            return tensor.detach().clone()

    def gather(self, name: str) -> ParamState:
        tensor, weight = self.tensors[name], self._weight(name)
        if not tensor.requires_grad:
            return ParamState(weight, {})
        kept = self.kept(name)  # at stage 0 everything, else the moving average
        if self.stage:
            kept |= {key: self.utils.safe_get_full_optimizer_state(tensor, key) for key in self.entry.state_names}
        return ParamState(weight, kept)

    @torch.no_grad()
    def scatter(self, name: str, whole: ParamState) -> None:
        tensor, weight = self.tensors[name], whole.weight.to(self.world.device)
        if self.stage < 3:
            tensor.copy_(weight)
        else:
            with self.gathered([tensor], modifier_rank=0):
                tensor.copy_(weight)
        if not tensor.requires_grad:
            return
        pieces = {key: value.to(self.world.device) for key, value in whole.state.items()}
        cut = set(self.entry.state_names) if self.stage else set()
        self.keep(name, {key: piece for key, piece in pieces.items() if key not in cut})
        if cut:
            self._set(tensor, weight, None)
        for key in pieces.keys() & cut:
            self._set(tensor, pieces[key], key)

    def _set(self, tensor: Any, value: Tensor, key: str | None) -> None:
        """Write the optimizer's copy of a parameter (key None) or some of its state: this rank's part of `value`."""
        if self.stage < 3:
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
            zeros = {key: torch.zeros_like(tensor, requires_grad=False) for key in self.entry.state_names}
            self.optimizer.state[tensor] = self.entry.state(zeros, self.update.done.to(tensor.device))
        if self.stage in (1, 2):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def set_counters(self, counters: dict[str, Tensor]) -> None:
        super().set_counters(counters)
        self._begin_moments()
