"""What a checkpoint holds, the same for every engine and world size: weights, what the optimizer keeps, a few counters.

Tensors are whole and named by parameter, in safetensors files: `model.safetensors` has every weight (float32), and
each rank writes `exp_avg.NAME` and so on of its share of the parameters. So a run may go on with another engine,
another ZeRO stage or another number of processes, and nothing read from a checkpoint is ever unpickled.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_dist.engine.base import Engine, ParamState, Shapes
from mae_dist.engine.world import World
from mae_dist.errors import UserError
from mae_dist.model import MAE

WEIGHTS = "model.safetensors"
COUNTER = "counter."
OLD_PREFIXES = {"ema.safetensors": "ema."}  # of fine-tuning, once: its moving average had a file of its own


class Snapshot(NamedTuple):
    """One rank's share of a run's state in host memory, which later steps leave alone."""

    weights: dict[str, Tensor]
    """All of them on rank 0, none elsewhere."""
    kept: dict[str, Tensor]
    """`exp_avg.NAME` and so on of this rank's share; on rank 0 the counters too."""
    rank: int
    world_size: int
    broken: str = ""
    """The first tensor that is not finite, the same on every rank; empty when all are."""

    def write(self, directory: Path) -> list[Path]:
        """Write this rank's files into an existing directory; returns them. Talks to no other rank. Raises OSError."""
        share = directory / f"optimizer-{self.rank:05d}-of-{self.world_size:05d}.safetensors"
        files = {share: self.kept} | ({directory / WEIGHTS: self.weights} if self.weights else {})
        for path, tensors in files.items():
            save_tensors(tensors, path)
        return list(files)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:  # has no errno of its own; what is not the disk's fault is ours
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises OSError, and UserError where its bytes are none."""
    path.open("rb").close()  # the library calls whatever it may not read "not found"
    try:
        return load_file(path, device)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); remove it, or put back a copy") from None


def capture(engine: Engine, counters: Mapping[str, Tensor] = MappingProxyType({})) -> Snapshot:
    """Copy the state of a run between two steps, with further `counters`. Collective: every rank calls it.

    Returns when the copies are made; on CUDA that is what the training loop waits for.
    """
    world = engine.world
    owners = shares(engine.shapes, world.size)
    weights, kept, good = {}, {}, []
    for name in engine.shapes:
        whole = engine.gather(name)
        good += [finite(whole.weight, *whole.state.values())]
        if world.is_main:
            weights[name] = to_host(whole.weight.float())
        if owners[name] == world.rank:
            kept |= {f"{key}.{name}": to_host(tensor) for key, tensor in whole.state.items()}
    if world.is_main:
        kept |= {COUNTER + name: to_host(value) for name, value in (engine.counters() | dict(counters)).items()}
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return Snapshot(weights, kept, world.rank, world.size, first_broken(engine.shapes, good, world))


def finite(*tensors: Tensor) -> Tensor:
    """() bool: whether all numbers of the tensors are finite, in one pass without a copy."""
    return torch.stack([torch.stack(t.detach().float().aminmax()).isfinite().all() for t in tensors]).all()


def first_broken(names: Iterable[str], good: list[Tensor], world: World) -> str:
    """The first of `names` that is not `good` on some rank; empty: none. Collective."""
    bad = world.max((~torch.stack(good)).float()).tolist()
    return next((name for name, flag in zip(names, bad, strict=True) if flag), "")


def broken(engine: Engine) -> str:
    """The first entry of a run's state that is not finite, itself or what is kept of it; empty: none. Collective."""
    wholes = (engine.gather(name) for name in engine.shapes)
    return first_broken(engine.shapes, [finite(w.weight, *w.state.values()) for w in wholes], engine.world)


def check_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise UserError, naming a tensor, where not all numbers are finite."""
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise UserError(f"{where}: {name} has numbers that are not finite: these weights are ruined; use others")


def state_bytes(engine: Engine) -> int:
    """Of a checkpoint, at most: weights and what is kept of each, float32."""
    return 4 * (1 + len(engine.optimizer_state)) * sum(map(math.prod, engine.shapes.values()))


def shares(shapes: Shapes, world_size: int) -> dict[str, int]:
    """The rank that writes what is kept of each parameter: neighbours together, about as many numbers a rank."""
    total, before, owners = sum(map(math.prod, shapes.values())), 0, {}
    for name, shape in shapes.items():
        owners[name] = before * world_size // total
        before += math.prod(shape)
    return owners


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, on its way when this returns (pinned, from CUDA)."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def restore(engine: Engine, directory: Path) -> dict[str, Tensor]:
    """Put a checkpoint's state into an engine; returns all its counters, () each.

    Collective. Raises UserError when it is another model's.
    """
    check_shapes(directory, engine.shapes)
    with ExitStack() as stack:
        place: dict[str, Callable[[], Tensor]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file, prefix = stack.enter_context(safe_open(path, "pt")), OLD_PREFIXES.get(path.name, "")
            place |= {prefix + key: partial(file.get_tensor, key) for key in file.keys()}  # noqa: SIM118 (no dict)
        counters = {key.removeprefix(COUNTER): read() for key, read in place.items() if key.startswith(COUNTER)}
        engine.set_counters(counters)
        for name in engine.shapes:
            keys = {kind: f"{kind}.{name}" for kind in engine.optimizer_state if f"{kind}.{name}" in place}
            state = {kind: place[key]() for kind, key in keys.items()}
            weight = place[name]()
            check_finite({name: weight} | {keys[kind]: tensor for kind, tensor in state.items()}, directory)
            engine.scatter(name, ParamState(weight, state))
    return counters


def load_weights(model: MAE, directory: Path) -> None:
    """Load a checkpoint's weights alone. Raises UserError, naming a key, when they are another model's."""
    check_shapes(directory, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    weights = load_tensors(directory / WEIGHTS)
    check_finite(weights, directory)
    model.load_state_dict(weights)


def check_shapes(directory: Path, shapes: Shapes) -> None:
    with safe_open(directory / WEIGHTS, "pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for key in shapes.keys() | saved.keys():
        theirs, ours = saved.get(key), shapes.get(key)
        if ours != theirs:
            say = ["nothing" if shape is None else "x".join(map(str, shape)) for shape in (theirs, ours)]
            raise UserError(
                f"{directory}: a checkpoint of another model: {key} is {say[0]} there and {say[1]} in this config; "
                "use the config that the run was started with (config.yaml beside checkpoints/)"
            )
