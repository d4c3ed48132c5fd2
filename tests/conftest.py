"""What tests share: small images on disk, shards of them, and ways to run the real commands."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from mae_dist.launched import STOP_SIGNALS

# One thread a process, as under torchrun: two processes share two cores, and sums keep their order.
os.environ["OMP_NUM_THREADS"] = "1"

# Started in the background by a script, it is ignored, by us and by all that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("shared", deadline=None)  # machines are busy: no timed assertions
hypothesis.settings.load_profile("shared")

TINY = [
    "--model.enc_name=vit_tiny_patch16_224", "--model.img_size=16", "--model.patch_size=4",
    "--model.enc_dim=32", "--model.enc_depth=2", "--model.enc_heads=2",
    "--model.dec_dim=32", "--model.dec_depth=2", "--model.dec_heads=2",
    "--data.workers=1", "--optim.lr=1e-3", "--optim.warmup_epochs=0.5",
    "--train.precision=fp32", "--train.device=cpu", "--train.log_every=1", "--track.mlflow=false",
]  # fmt: skip


def write_images(directory: Path, classes: int, each: int, size: int = 24, seed: int = 0, suffix: str = "jpg") -> Path:
    """Class folders of smooth random images, all different."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        folder = directory / f"class_{c}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((size + i % 5, size), Image.Resampling.BICUBIC)
            image.save(folder / f"{i:03d}.{suffix}")
    return directory


@contextmanager
def signals_put_back() -> Iterator[None]:
    """A run in this process takes its signals; afterwards they are the tests' again."""
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in kept.items():
        signal.signal(number, handler)


FIRST_HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}


@pytest.fixture(autouse=True)
def first_handlers() -> Iterator[None]:
    """Whatever a test ran in this process, the next one finds the signals as pytest had them."""
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in FIRST_HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """2 classes of 23 JPEGs."""
    return write_images(tmp_path_factory.mktemp("images"), classes=2, each=23)


@pytest.fixture(scope="session")
def shards(images, tmp_path_factory) -> Path:
    """46 samples in 5 shards of 10, 10, 10, 10, 6."""
    from mae_dist.shards.write import shard

    out = tmp_path_factory.mktemp("shards") / "train"
    shard(images, out, shard_size=10)
    return out


def mae_dist(*arguments, processes: int = 0, check: bool = True, timeout: int = 120) -> subprocess.CompletedProcess:
    """Run the real command line, alone or under torchrun with `processes` processes."""
    launcher = [sys.executable, "-m", "mae_dist"]
    if processes:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        torchrun.append(f"--nproc-per-node={processes}")
        launcher = [*torchrun, "-m", "mae_dist"]
    done = subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step, from a run's journal."""
    records = map(json.loads, (run_dir / "journal.jsonl").read_text().splitlines())
    return {r["step"]: r["metrics"]["loss/train"] for r in records if "loss/train" in r.get("metrics", {})}


def has_turbojpeg() -> bool:
    """Whether TurboJPEG >= 3 is here."""
    from mae_dist.data.turbojpeg import library
    from mae_dist.errors import UserError

    try:
        library()
    except UserError:
        return False
    return True
