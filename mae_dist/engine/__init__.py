"""How one step runs over many devices."""

from mae_dist.engine.base import Engine, StepResult
from mae_dist.engine.build import build_engine
from mae_dist.engine.optim import OptimConfig
from mae_dist.engine.options import EngineConfig
from mae_dist.engine.state import Snapshot, capture, load_weights, restore, state_bytes
from mae_dist.engine.world import World

__all__ = [
    "Engine",
    "EngineConfig",
    "OptimConfig",
    "Snapshot",
    "StepResult",
    "World",
    "build_engine",
    "capture",
    "load_weights",
    "restore",
    "state_bytes",
]
