"""The line a person watches: rewritten in place on a terminal, one line a log step elsewhere."""

import sys
import time


def duration(seconds: float) -> str:
    """1d02h, 3h05m, 4m10s, 12s."""
    s = round(seconds)
    for unit, size, small, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if s >= size:
            return f"{s // size}{unit}{s % size // small_size:02d}{small}"
    return f"{s}s"


def say(text: str) -> None:
    """A line of its own between those that are rewritten in place."""
    print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)


class Progress:
    """`start` and `total`: updates done and to do."""

    def __init__(self, start: int, total: int):
        self.start, self.total, self.began = start, total, time.perf_counter()

    def show(self, done: int, metrics: dict[str, float]) -> None:
        per_step = (time.perf_counter() - self.began) / (done - self.start)
        line = (
            f"step {done}/{self.total} | epoch {metrics['progress/epoch']:.2f} | loss {metrics['loss/train']:.4f} | "
            f"lr {metrics['optim/lr']:.2e} | grad {metrics['optim/grad_norm']:.3f} | "
            f"{metrics['perf/images_per_s']:.0f} images/s | data wait {metrics['perf/data_wait']:.1%} | "
            + (f"skipped {metrics['optim/skipped']:.0f} | " if metrics["optim/skipped"] else "")
            + (f"bad samples {metrics['progress/bad_samples']:.0f} | " if metrics["progress/bad_samples"] else "")
            + f"ETA {duration(per_step * (self.total - done))}"
        )
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if done == self.total else "", flush=True)
        else:
            print(line, flush=True)
