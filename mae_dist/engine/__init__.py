"""How one step runs over many devices."""

from mae_dist.engine.base import Engine, OptimConfig, StepResult
from mae_dist.engine.native import NativeEngine
from mae_dist.engine.state import Snapshot, capture, load_weights, restore
from mae_dist.engine.world import World

__all__ = [
    "Engine",
    "NativeEngine",
    "OptimConfig",
    "Snapshot",
    "StepResult",
    "World",
    "capture",
    "load_weights",
    "restore",
]
