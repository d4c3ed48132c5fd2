"""Which engine runs the steps, and its options."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mae_dist.errors import UserError
from mae_dist.ranges import check_numbers

OWNERS = {"zero_stage": "deepspeed", "offload": "deepspeed", "compress_gradients": "ddp"}


@dataclass(frozen=True)
class EngineConfig:
    """How one step runs over many devices. A run may go on with another engine: the same curve, to float error."""

    name: Literal["ddp", "deepspeed", "fsdp"] = "ddp"
    """ddp: a replica in each process. deepspeed: ZeRO. fsdp: FSDP2, which cuts weights, gradients and moments."""
    zero_stage: int = 2
    """deepspeed: what is cut over the processes. 0: nothing, 1: the moments, 2: gradients too, 3: weights too."""
    offload: bool = False
    """deepspeed, stages 1 to 3: AdamW runs on the CPU and its moments lie in host memory."""
    compile: bool = False
    """torch.compile for each block; needs a C compiler and costs minutes at the start of every process."""
    compress_gradients: bool = False
    """ddp: gradients travel as bf16, half the bytes; the curve changes within bf16 error."""

    RANGES: ClassVar = {"zero_stage": "[0, 3]"}

    def check(self) -> None:
        """Raise UserError for an option of another engine."""
        check_numbers(self, "engine.")
        for key, owner in OWNERS.items():
            if getattr(self, key) != getattr(EngineConfig, key) and self.name != owner:
                raise UserError(f"engine.{key}: is an option of engine.name {owner}, not of {self.name}; leave it out")
        if self.offload and self.zero_stage == 0:
            raise UserError("engine.offload: needs engine.zero_stage 1, 2 or 3 (stage 0 leaves AdamW as it is)")
        if self.compile and self.name == "deepspeed" and self.zero_stage == 3:  # hooks around every module
            raise UserError("engine.compile: not with engine.zero_stage 3; write zero_stage 2, or engine.name fsdp")
