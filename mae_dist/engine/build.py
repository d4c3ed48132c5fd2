"""From an engine's name to the engine; each is imported only where it is used."""

from mae_dist.engine.base import Engine, OptimConfig, Precision
from mae_dist.engine.options import EngineConfig
from mae_dist.engine.update import check_compiler, compile_blocks
from mae_dist.engine.world import World
from mae_dist.model import MAE


def build_engine(
    config: EngineConfig, model: MAE, world: World, optim: OptimConfig, precision: Precision, accumulate: int = 1
) -> Engine:
    """The engine that `config` names, around `model`. Collective. Raises UserError when deepspeed is not installed."""
    if config.compile:
        check_compiler(world.device)
        compile_blocks(model)
    if config.name == "deepspeed":
        from mae_dist.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, world, optim, precision, accumulate, config.zero_stage, config.offload)
    if config.name == "fsdp":
        from mae_dist.engine.fsdp import FSDPEngine

        return FSDPEngine(model, world, optim, precision, accumulate)
    from mae_dist.engine.native import NativeEngine

    return NativeEngine(model, world, optim, precision, accumulate, config.compress_gradients)
