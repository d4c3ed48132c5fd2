"""From an engine's name to the engine; each is imported only where it is used."""

from mae_dist.engine.base import Engine, Precision, Trainable
from mae_dist.engine.optim import OptimizerConfig
from mae_dist.engine.options import EngineConfig
from mae_dist.engine.update import check_compiler
from mae_dist.engine.world import World


def build_engine(
    config: EngineConfig,
    module: Trainable,
    world: World,
    optim: OptimizerConfig,
    precision: Precision,
    accumulate: int = 1,
) -> Engine:
    """The engine that `config` names, around `module`. Collective.

    Raises UserError when deepspeed is not installed, or cannot do what `optim` asks for.
    """
    if config.compile:
        check_compiler(world.device)
    engine = _build(config, module, world, optim, precision, accumulate)
    if config.compile:
        module.compile_blocks()
    return engine


def _build(
    config: EngineConfig,
    module: Trainable,
    world: World,
    optim: OptimizerConfig,
    precision: Precision,
    accumulate: int,
) -> Engine:
    if config.name == "deepspeed":
        from mae_dist.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, world, optim, precision, accumulate, config.zero_stage, config.offload)
    if config.name == "fsdp":
        from mae_dist.engine.fsdp import FSDPEngine

        return FSDPEngine(module, world, optim, precision, accumulate)
    from mae_dist.engine.native import NativeEngine

    return NativeEngine(module, world, optim, precision, accumulate, config.compress_gradients)
