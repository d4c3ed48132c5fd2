"""One process of the engine tests: `python -m tests.engine.worker PHASE OUT ENGINE...`, alone or under torchrun.

All engines take turns in one set of processes, because starting one costs more than training it. Each phase writes
OUT/PHASE-WORLD.json (rank 0) and checkpoints beside it; the tests compare.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mae_dist.engine import EngineConfig, OptimConfig, World, build_engine, capture, restore
from mae_dist.launched import leave
from mae_dist.model import MAE, MAEConfig

MODEL = MAEConfig(
    "vit_tiny_patch16_224", img_size=16, patch_size=4, dec_dim=32, dec_depth=2, dec_heads=2,
    enc_dim=32, enc_depth=2, enc_heads=2,
)  # fmt: skip
ENGINES = {
    "ddp": EngineConfig("ddp"),
    "fsdp": EngineConfig("fsdp"),
    "zero-0": EngineConfig("deepspeed", 0),
    "zero-1": EngineConfig("deepspeed", 1),
    "zero-2": EngineConfig("deepspeed", 2),
    "zero-3": EngineConfig("deepspeed", 3),
    "zero-2 offload": EngineConfig("deepspeed", 2, offload=True),
    "zero-3 offload": EngineConfig("deepspeed", 3, offload=True),
}
BATCH, STEPS, SAVED, LATER = 24, 30, 10, 20
LINEAR = F.linear
OPTIM = OptimConfig(clip_grad=2.0)  # some gradients are above, some below


def build(label, world, precision="fp32", accumulate=1, optim=OPTIM):
    F.linear = LINEAR  # stage 3 replaces it in the whole process, where no other engine is meant to follow
    torch.manual_seed(0)
    return build_engine(ENGINES[label], MAE(MODEL), world, optim, precision, accumulate)


def batch(step, size=BATCH):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.rand(size, 16, generator=generator)


def lr(step):
    return 2e-3 * min(1.0, (step + 1) / 5)


def advance(engine, first, last, size=BATCH, spoil=lambda micro, images: None):
    """Steps `first` to `last`; the mean loss over ranks and the gradient norm of each, and whether it was skipped."""
    world, found = engine.world, []
    for step in range(first, last):
        share = size // world.size
        images, noise = (t[world.rank * share :][:share] for t in batch(step, size))
        for micro, (x, z) in enumerate(
            zip(images.chunk(engine.accumulate), noise.chunk(engine.accumulate), strict=True)
        ):
            spoil(micro, x)
            engine.forward_backward(x, z, last=micro == engine.accumulate - 1)
        result = engine.step(lr(step))
        loss = float(world.sum(result.loss.clone())) / world.size
        found.append([loss, float(result.grad_norm), float(result.skipped)])
    return found


def save(engine, directory):
    directory.mkdir(parents=True, exist_ok=True)
    engine.world.barrier()
    capture(engine).write(directory)
    engine.world.barrier()


def holds(engine, directory, counters=("updates", "loss_scale", "good_steps")):
    """Whether the engine's state is, bit for bit, what lies in a checkpoint; of the counters, those named."""
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    saved = {key: value for file in files for key, value in file.items()}
    same = []
    for name in engine.shapes:
        part = engine.gather(name)
        whole = {name: part.weight} | {f"{key}.{name}": tensor for key, tensor in part.state.items()}
        same += [torch.equal(value, saved.pop(key)) for key, value in whole.items()]
    for key, value in engine.counters().items():
        same.append(torch.equal(value, saved.pop(f"counter.{key}")) or key not in counters)
    return all(same) and not saved


def place(out, label, step, world_size):
    return out / f"{label.replace(' ', '-')}-{step}-of-{world_size}"


def curves(labels, world, out):
    """All curves; on the way checkpoints at two steps."""
    found = {"fp32": {}, "bf16": {}, "fp16": {}}
    for label in labels:
        for precision in found:
            engine = build(label, world, precision)
            curve = advance(engine, 0, SAVED)
            if precision == "fp32":
                save(engine, place(out, label, SAVED, world.size))
            curve += advance(engine, SAVED, LATER)
            if precision == "fp32":
                save(engine, place(out, label, LATER, world.size))
            found[precision][label] = curve + advance(engine, LATER, STEPS)
    return found


def twice(labels, world, out):
    """The two checkpoints of `curves` alone, whole and accumulated over two micro-batches."""
    for label in labels:
        for accumulate in (1, 2):
            engine = build(label, world, accumulate=accumulate)
            for first, last in ((0, SAVED), (SAVED, LATER)):
                advance(engine, first, last)
                save(engine, place(out, f"{label} {accumulate}", last, world.size))


def twice_again(labels, world, out):
    """What `again` does, for the checkpoints of `twice`."""
    found = {}
    for label in labels:
        for accumulate in (1, 2):
            engine = build(label, world, accumulate=accumulate)
            restore(engine, place(out, f"{label} {accumulate}", SAVED, world.size))
            advance(engine, SAVED, LATER)
            found[f"{label} {accumulate}"] = holds(engine, place(out, f"{label} {accumulate}", LATER, world.size))
    return found


def skips(labels, world, out):
    """What a bad number on the last rank does, in the first of two micro-batches, or in the loss alone."""
    found = {}
    for label in labels:
        for precision in ("fp32", "bf16", "fp16"):
            engine = build(label, world, precision, accumulate=2)
            advance(engine, 0, 2)
            before = out / "before"
            save(engine, before)

            def spoil(micro, images):
                if micro == 0 and world.rank == world.size - 1:
                    images[:, 0] = math.nan

            def spoil_loss(micro, images, engine=engine):
                if micro == 0 and world.rank == world.size - 1:
                    engine.update.loss += math.inf

            flags, kept = [], []
            for bad in (spoil, spoil_loss):
                flags += [step[2] for step in advance(engine, 2, 4, spoil=bad)]
                kept.append(holds(engine, before, ["updates"]))  # the loss scale of fp16 may move, nothing else
            flags += [step[2] for step in advance(engine, 4, 6)]
            most, least = world.max(torch.tensor(flags)).tolist(), (-world.max(-torch.tensor(flags))).tolist()
            agreed = most == flags == least  # both first: ranks that disagree would not meet in the second
            moved = not holds(engine, before)
            found[f"{label}, {precision}"] = [flags, all(kept), moved, agreed]
    return found


def cut(labels, world, out):
    """Curves of ten steps of 32 images: on one rank whole and as 4 x 8, on two as 2 x 16."""
    ways = {"32": 1, "4x8": 4} if world.size == 1 else {"2x16": 1, "2x2x8": 2}
    return {
        label: {way: advance(build(label, world, accumulate=n), 0, 10, size=32) for way, n in ways.items()}
        for label in labels
    }


def cross(labels, world, out):
    """Every engine goes on two steps from every engine's checkpoint of two ranks."""
    found = {}
    for label in labels:
        engine = build(label, world)
        for source in labels:
            restore(engine, place(out, source, SAVED, 2))
            whole = holds(engine, place(out, source, SAVED, 2))
            found[f"{source} to {label}"] = [whole, advance(engine, SAVED, SAVED + 2)]
    return found


def chain(labels, world, out, first, last, before):
    """A part of the curve that changes its number of ranks on the way."""
    found = {}
    for label in labels:
        engine = build(label, world)
        restore(engine, place(out, label, first, before))
        found[label] = advance(engine, first, last)
        save(engine, place(out, label, last, world.size))
    return found


def again(labels, world, out):
    """From the first checkpoint to the second, in new processes at the same world size; is the state the same?"""
    found = {}
    for label in labels:
        engine = build(label, world)
        restore(engine, place(out, label, SAVED, world.size))
        advance(engine, SAVED, LATER)
        found[label] = holds(engine, place(out, label, LATER, world.size))
    return found


def compiled(labels, world, out):
    """Three steps of whole blocks compiled, and without."""
    import dataclasses

    found = {}
    for label in labels:
        plain = advance(build(label, world), 0, 3)
        torch.manual_seed(0)
        config = dataclasses.replace(ENGINES[label], compile=True)
        found[label] = [plain, advance(build_engine(config, MAE(MODEL), world, OPTIM, "fp32", 1), 0, 3)]
    return found


PHASES = {
    "curves": curves,
    "skips": skips,
    "cut": cut,
    "cross": cross,
    "again": again,
    "twice": twice,
    "twice_again": twice_again,
    "compiled": compiled,
    "chain-1": lambda *a: chain(*a, first=10, last=15, before=2),
    "chain-3": lambda *a: chain(*a, first=15, last=20, before=1),
    "chain-2": lambda *a: chain(*a, first=20, last=30, before=3),
}


def main() -> None:
    phases, out, labels = sys.argv[1].split(","), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    world = World.join("cpu")
    if any(label.startswith("zero") for label in labels):
        from mae_dist.engine import deepspeed

        deepspeed.PERSISTENT = 2000  # so that stage 3 has something to gather in so small a model
        deepspeed.BUCKET = 20_000  # and every stage several buckets
    for phase in phases:
        result = PHASES[phase](labels, world, out)
        if world.is_main:
            (out / f"{phase}-of-{world.size}.json").write_text(json.dumps(result))
    world.leave()
    leave(0)


if __name__ == "__main__":
    main()
