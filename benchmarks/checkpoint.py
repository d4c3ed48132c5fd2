"""What a checkpoint costs: its bytes and seconds, and how long the training waits for it, in background and without.

The two take turns: in each round a step, a save, and the steps until it is on disk, once in background and once waited
for. `lost` is what the round took beyond its steps at the speed without a save: the wait, and what the writing takes
from the steps beside it (processor and memory; much on a CPU that also trains).

    python -m benchmarks.checkpoint [--config configs/vit_b16.yaml] [--batch 4] [--device cuda] [--out F.json]
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import keep_memory, machine
from mae_dist import config as configs
from mae_dist.engine import World, capture, state_bytes
from mae_dist.engine.native import NativeEngine
from mae_dist.model import MAE
from mae_dist.train.checkpoint import Checkpoints, committed, problems
from mae_dist.train.saving import Saver


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Seconds of each round; every checkpoint is verified."""
    config = configs.load(["--config", str(args.config)])
    world = World(0, 1, torch.device(args.device))
    torch.manual_seed(0)
    engine = NativeEngine(MAE(config.model), world, config.optim, "bf16" if args.device == "cuda" else "fp32")
    images = torch.randn(args.batch, config.model.in_chans, *config.model.height_width, device=world.device)
    noise = torch.rand(args.batch, config.model.num_patches, device=world.device)

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            engine.forward_backward(images, noise, last=True)
            engine.step(1e-4)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    steps(args.warmup)
    checkpoints = Checkpoints(directory, world, keep=1)
    saver = partial(Saver, checkpoints, partial(capture, engine), state_bytes(engine))
    ways = {"background": saver(True), "waited_for": saver(False)}
    found: dict[str, dict[str, list[float]]] = {way: {"stall_s": [], "write_s": [], "lost_s": []} for way in ways}
    plain, size = [], 0
    for saved in range(-1, args.rounds * 2):  # the first one warms up: pinned memory, the allocator
        way, saver = list(ways.items())[saved % 2]
        step_s = steps(args.steps) / args.steps
        began = time.perf_counter()
        saver.save(saved + 2, {}, wait=False)
        stall, count = time.perf_counter() - began, 0
        while saver.write and saver.write.is_alive():
            steps(1)
            count += 1
        lost = time.perf_counter() - began - count * step_s
        if saver.write:
            saver.write.join()
            found_seconds = saver.write.seconds
            saver.report()
        else:
            found_seconds = stall
        if saved >= 0:
            plain.append(step_s)
            for key, value in (("stall_s", stall), ("write_s", found_seconds), ("lost_s", lost)):
                found[way][key].append(value)
        print(
            f"{way}: step {step_s:.2f} s, stall {stall:.2f} s, write {found_seconds:.2f} s, lost {lost:.2f} s",
            flush=True,
        )
        newest = committed(directory)[-1]
        if problems(newest):
            raise SystemExit(f"damaged: {problems(newest)}")
        size = sum(path.stat().st_size for path in newest.iterdir())
    medians = {way: {key: statistics.median(v) for key, v in values.items()} for way, values in found.items()}
    return {
        "parameters": sum(map(math.prod, engine.shapes.values())),
        "bytes": size,
        "step_s": statistics.median(plain),
        "medians": medians,
        "rounds": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/vit_b16.yaml"), help="whose model (%(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="of each way (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed without a save, each round (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dir", type=Path, help="on the disk to measure (a temporary directory)")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    if args.device == "cpu":
        keep_memory()
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        result = measure(args, Path(directory))
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.checkpoint", *sys.argv[1:]]),
        "machine": machine(args.device),
        "settings": {key: str(value) for key, value in vars(args).items() if key not in ("out", "dir")},
        **result,
    }
    print(f"{args.config}: {result['parameters'] / 1e6:.1f} M parameters, {result['bytes'] / 1e6:.0f} MB a checkpoint")
    print(f"{report['machine']}; median step {result['step_s']:.2f} s")
    for way, values in result["medians"].items():
        print(f"{way:<11}" + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
