"""How far a long job is: a bar on a terminal, JSON lines every few seconds for a log."""

import json
import sys
import time

from tqdm import tqdm

EVERY = 5.0  # seconds between JSON lines


class Progress:
    """Counts images (or what `unit` says) and bytes; as a context manager it is closed at the end.

    `before`: images that an earlier start had already done; they do not count for speed.
    """

    def __init__(self, title: str, total: int, before: int = 0, unit: str = "images"):
        self.title, self.total, self.before, self.unit = title, total, before, unit
        self.images, self.bytes = 0, 0
        self.start = self.said = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=before, unit=unit[:-1], desc=title, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int) -> None:
        """So many more; shown when it is time to."""
        self.add(count, 0)
        self.tick()

    def add(self, images: int, num_bytes: int) -> None:
        self.images += images
        self.bytes += num_bytes
        if self.bar is not None:
            self.bar.update(images)

    def tick(self) -> None:
        """Call often: shows when it is time to."""
        now = time.monotonic()
        if self.bar is not None:
            if self.bytes:
                self.bar.set_postfix_str(f"{self.bytes / 1e6 / max(now - self.start, 1e-9):.1f} MB/s", refresh=True)
        elif now - self.said >= EVERY:
            self._line(now)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line(time.monotonic())

    def _line(self, now: float) -> None:
        self.said = now
        seconds = max(now - self.start, 1e-9)
        speed = self.images / seconds
        left = self.total - self.before - self.images
        line = {
            "doing": self.title,
            self.unit: self.before + self.images,
            "of": self.total,
            "seconds": round(seconds, 1),
            f"{self.unit}_per_s": round(speed, 1),
            **({"mb_per_s": round(self.bytes / 1e6 / seconds, 2)} if self.bytes else {}),
            "eta_s": round(left / speed, 1) if speed else None,
        }
        print(json.dumps(line), file=sys.stderr, flush=True)
