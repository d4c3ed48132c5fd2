"""`python -m tests.cluster.audited pretrain ...`: mae_dist, and on disk what each rank was given to train on, and when.

Every micro-batch is a line of `$CHAOS_AUDIT/ATTEMPT-RANK.jsonl`. Steps and saves are slowed down a little, so that
faults of a harness that looks on from outside can hit any part of them. The product knows nothing of this.
"""

import hashlib
import inspect
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mae_dist import cli
from mae_dist.data.loader import Batch, ImageStream

STEP_S, SAVE_S = 0.03, 0.04


class AuditedStream(ImageStream):
    """Writes down each batch before it is trained on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        given = inspect.signature(ImageStream.__init__).bind(self, *args, **kwargs)
        given.apply_defaults()
        self.first, self.rank, self.micro = (given.arguments[name] for name in ("start", "rank", "accumulate"))

    def __iter__(self) -> Iterator[Batch]:
        name = f"{int(os.environ['CHAOS_ATTEMPT']):03d}-{self.rank}.jsonl"
        with Path(os.environ["CHAOS_AUDIT"], name).open("a", buffering=1) as file:  # a line is one write
            for n, batch in enumerate(super().__iter__()):
                pixels = batch.images.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
                line = {
                    "step": self.first + n // self.micro + 1,
                    "epochs": batch.epochs.tolist(),
                    "ids": batch.ids.tolist(),
                    "pixels": [hashlib.blake2b(one.tobytes(), digest_size=16).hexdigest() for one in pixels],
                }
                file.write(json.dumps(line) + "\n")
                yield batch
                time.sleep(STEP_S)


def main() -> None:
    """Everything in its place, then the real command line."""
    from mae_dist.engine.state import Snapshot
    from mae_dist.train import run

    assert run.ImageStream is ImageStream
    run.ImageStream = AuditedStream
    write = Snapshot.write

    def slow_write(self: Snapshot, directory: Path) -> list[Path]:
        time.sleep(SAVE_S)
        files = write(self, directory)
        time.sleep(SAVE_S)
        return files

    Snapshot.write = slow_write
    cli.main()


if __name__ == "__main__":
    main()
