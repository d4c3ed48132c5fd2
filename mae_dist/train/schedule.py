"""The learning rate: a pure function of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from exactly 0, then half a cosine to `min_lr` (paper appendix A.1, per update)."""

    peak_lr: float
    min_lr: float
    warmup_steps: float
    total_steps: float

    def lr(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1e-9, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
