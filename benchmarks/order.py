"""What the order of samples costs at scale, and how well it shuffles.

Cost: synthetic shards, up to 10^10 samples in 10^6 shards. A resume is a new SampleOrder (from the counts alone) and
its first batch, in the middle of an epoch; then batches of 4096 one after another; memory is what the process grew by.

Quality: ImageNet's numbers (1,281,167 samples, 1000 classes) in shards sorted by class, the worst case. Counted are the
pairs of samples of one class in a batch of 4096, as a multiple of those that a full shuffle has on average, and the
different classes in a batch. webdataset's rows use its own `shuffle` filter: so many workers, each with its own shards
and its own buffer of so many samples, each giving an equal share of every batch.

    python benchmarks/order.py [--out benchmarks/results/order.json]
"""

import argparse
import json
import multiprocessing
import platform
import random
import resource
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle

from mae_dist.shards import SampleOrder

BATCH = 4096
SCALES = [(10**6, 10**3), (10**9, 10**5), (10**10, 10**6)]
SETTINGS = [(1, 0), (256, 4096)]
SAMPLES, CLASSES, SHARD = 1_281_167, 1000, 1000
ORDERS = [(1, 0), (1, 4096), (64, 4096), (256, 1024), (256, 4096), (256, 16384), (1024, 1024), (1024, 4096)]
BUFFERS = [(8, 1000), (8, 5000), (64, 1000), (64, 5000), (256, 1000)]
BATCHES_LOOKED_AT = 24


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost(samples: int, shards: int, lanes: int, window: int, rounds: int) -> dict:
    """Times in milliseconds, memory in MB; in a process of its own, so that its peak is this order's."""
    before = megabytes()
    counts = np.full(shards, samples // shards)
    middle = samples // 2 // BATCH
    resumes, batches = [], []
    for n in range(rounds):
        start = time.perf_counter()
        order = SampleOrder(counts, seed=n, lanes=lanes, window=window)
        order.batch(middle, BATCH)
        resumes.append(1000 * (time.perf_counter() - start))
        start = time.perf_counter()
        for k in range(middle + 1, middle + 6):
            order.batch(k, BATCH)
        batches.append(1000 * (time.perf_counter() - start) / 5)
    return {
        "samples": samples,
        "shards": shards,
        "lanes": lanes,
        "window": window,
        "resume_ms": statistics.median(resumes),
        "batch_ms": statistics.median(batches),
        "batch_ms_worst_round": max(batches),
        "memory_mb": megabytes() - before,
    }


def labels_of(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classes of samples that lie sorted by class."""
    return ids * CLASSES // SAMPLES


def quality(batches: Iterator[NDArray[np.int64]]) -> dict:
    """Same-class pairs against a full shuffle's expectation, and classes, over some batches of labels (B,)."""
    size = np.bincount(labels_of(np.arange(SAMPLES)))
    expected = BATCH * (BATCH - 1) * (size * (size - 1)).sum() / (SAMPLES * (SAMPLES - 1))
    times = [np.bincount(batch, minlength=CLASSES) for batch in batches]
    pairs = [float((t * (t - 1)).sum() / expected) for t in times]
    return {
        "same_class_pairs": statistics.mean(pairs),
        "worst_batch": max(pairs),
        "classes": statistics.mean(int((t > 0).sum()) for t in times),
    }


def ours(lanes: int, window: int) -> Iterator[NDArray[np.int64]]:
    """Labels of batches spread over two epochs."""
    counts = np.full(-(-SAMPLES // SHARD), SHARD)
    counts[-1] = SAMPLES - counts[:-1].sum()
    order = SampleOrder(counts, seed=1, lanes=lanes, window=window)
    for k in np.linspace(0, 2 * SAMPLES // BATCH - 1, BATCHES_LOOKED_AT).astype(int).tolist():
        yield labels_of(order.lookup(np.arange(k * BATCH, (k + 1) * BATCH)).id)


def webdataset(workers: int, buffer: int) -> Iterator[NDArray[np.int64]]:
    """Labels of batches spread over one epoch; every sample of it is read, as webdataset would."""
    shards = list(range(-(-SAMPLES // SHARD)))
    random.Random(1).shuffle(shards)

    def stream(worker: int) -> Iterator[int]:
        for shard in shards[worker::workers]:
            yield from range(shard * SHARD, min((shard + 1) * SHARD, SAMPLES))

    streams = [shuffle(buffer, seed=worker)(stream(worker)) for worker in range(workers)]
    whole = SAMPLES // workers * workers // BATCH - workers  # before any worker runs dry
    wanted = set(np.linspace(0, whole, BATCHES_LOOKED_AT).astype(int).tolist())
    for k in range(whole + 1):
        ids = [sample for one in streams for sample in islice(one, BATCH // workers)]
        if k in wanted and len(ids) == BATCH:
            yield labels_of(np.array(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "order.json")
    args = parser.parse_args()

    costs, qualities = [], []
    print(
        f"{'samples':>13} {'shards':>9} {'lanes':>6} {'window':>7} {'resume ms':>10} {'batch ms':>9} {'memory MB':>10}"
    )
    for samples, shards in SCALES:
        for lanes, window in SETTINGS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                c = pool.apply(cost, (samples, shards, lanes, window, args.rounds))
            costs.append(c)
            print(f"{samples:>13,} {shards:>9,} {lanes:>6} {window or 'all':>7} {c['resume_ms']:>10.1f} "
                  f"{c['batch_ms']:>9.1f} {c['memory_mb']:>10.0f}", flush=True)  # fmt: skip
    print(f"\n{'order, shards sorted by class':<40} {'same-class pairs':>16} {'worst batch':>12} {'classes':>8}")
    rows = [(f"lanes {lanes}, window {window or 'all'}", ours(lanes, window)) for lanes, window in ORDERS]
    rows += [(f"webdataset, {w} workers, shuffle({buffer})", webdataset(w, buffer)) for w, buffer in BUFFERS]
    for name, batches in rows:
        q = quality(batches)
        qualities.append({"order": name, **q})
        print(f"{name:<40} {q['same_class_pairs']:>16.2f} {q['worst_batch']:>12.2f} {q['classes']:>8.0f}", flush=True)
    report = {
        "command": "python benchmarks/order.py",
        "machine": {"cpu": cpu(), "numpy": np.__version__, "python": platform.python_version()},
        "batch": BATCH,
        "rounds": args.rounds,
        "cost": costs,
        "quality": qualities,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


if __name__ == "__main__":
    main()
