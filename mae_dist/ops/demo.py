"""Everything once, with the real commands, on images that come with scikit-learn.

Its 1,797 handwritten digits are pretrained on and classified; its two photographs give reconstructions to look at.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_dist.errors import UserError
from mae_dist.track import TrackConfig

CONFIGS = next(  # of the clone that this package runs from, or (in the container) of the current directory
    (path for path in (Path(__file__).parents[2] / "configs", Path("configs")) if path.is_dir()), Path("configs")
)
MADE = ("images", "shards", "runs", "reconstruction.png")  # by a demo, in its directory
TEST_SHARE = 5  # every fifth digit is held out
TILE, STRIDE = 128, 32  # pixels: pieces of the photographs, shrunk to 64
UNSEEN = (0.4, 0.68)  # the part of each photograph's width that is held out


def write_digits(directory: Path) -> None:
    """The digits as 16x16 PNGs in class folders, `train/` and `test/`."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()  # a Bunch, which is typed as a pair
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        folder = directory / ("test" if i % TEST_SHARE == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:04d}.png")


def write_photos(directory: Path) -> list[Path]:
    """Overlapping 64x64 pieces of the photographs, `test/` from a band in the middle of each, `train/` from the rest.

    Returns the files of `test/`.
    """
    from sklearn.datasets import load_sample_images

    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        height, width = photo.shape[:2]
        first, last = (int(width * share) for share in UNSEEN)
        for top, left in product(range(0, height - TILE + 1, STRIDE), range(0, width - TILE + 1, STRIDE)):
            if first <= left and left + TILE <= last:
                folder = directory / "test"
            elif left + TILE <= first or last <= left:
                folder = directory / "train"
            else:
                continue  # across the border
            folder.mkdir(parents=True, exist_ok=True)
            piece = Image.fromarray(photo[top : top + TILE, left : left + TILE])
            piece.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{name}_{top:03d}_{left:03d}.png")
    return sorted((directory / "test").iterdir())


def run(command: Sequence[str]) -> None:
    """Print a command as one would type it, and run it. Raises UserError when it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    program = {
        "mae-dist": [sys.executable, "-m", "mae_dist"],
        "python": [sys.executable],
    }
    finished = subprocess.run([*program[command[0]], *command[1:]], env=os.environ | {"OMP_NUM_THREADS": "1"})
    if finished.returncode:
        raise UserError(f"the demo's command ended with status {finished.returncode}: {' '.join(command)}")


def evaluate(digits: Path) -> None:
    """k-NN and linear probe of pixels, the untrained and the pretrained encoder: all labels, then ten a class."""
    few = ["--per-class", "10"]
    knn = ["mae-dist", "knn", str(digits), "--of", "pixels", "untrained", "pretrained", "--k", "10", "20"]
    linear = ["mae-dist", "linear", str(digits), "--sweep", "--config", str(CONFIGS / "demo_linear.yaml")]
    run(knn)
    run([*knn, *few, "--seeds", "0", "1", "2"])
    run([*linear, "--train.steps", "600"])
    run([*linear, *few])


def clear(directory: Path) -> None:
    """Make an empty directory, or one without what an earlier demo left there. Raises UserError for any other."""
    marker = directory / ".mae_dist_demo"
    try:
        if directory.exists() and not marker.exists() and any(directory.iterdir()):
            raise UserError(f"{directory}: not empty, and not an earlier demo; write --dir with a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for name in MADE:
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be used: {error.strerror}; write --dir with a new directory") from None


def demo(directory: Path) -> None:
    """Shard, pretrain on two processes, reconstruct, evaluate before and after; prints where to look."""
    if not (CONFIGS / "demo.yaml").is_file():
        raise UserError("no configs/demo.yaml: run the demo from a clone of the repository")
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        raise UserError("the demo's images come with scikit-learn: pip install scikit-learn") from None
    TrackConfig().check()
    clear(directory)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # its commands end with it
    images, runs = directory / "images", directory / "runs"
    write_digits(images / "digits")
    unseen = write_photos(images / "photos")
    shards = {
        name: directory / "shards" / name.replace("/", "-") for name in ("digits/train", "digits/test", "photos/train")
    }
    for name, out in shards.items():
        run(["mae-dist", "shard", str(images / name), str(out), "--shard-size", "250", "--workers", "2"])
    pretrain = [
        "python",
        "-m",
        "mae_dist.launch",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mae_dist",
        "pretrain",
    ]
    where = ["--train.runs_dir", str(runs)]
    digits = ["--data.shards", str(shards["digits/train"]), "--data.val_shards", str(shards["digits/test"])]
    run([*pretrain, "--config", str(CONFIGS / "demo.yaml"), *digits, *where])
    photos = ["--data.shards", str(shards["photos/train"])]
    run([*pretrain, "--config", str(CONFIGS / "demo_photos.yaml"), *photos, *where])
    picture = str(directory / "reconstruction.png")
    run(["mae-dist", "reconstruct", str(runs / "photos"), *map(str, unseen[1::3][:12]), "--out", picture])
    evaluate(runs / "digits")
    from mae_dist.track.place import how_to_watch

    print(
        "\nRaw pixels do well here because these digits are small and centred; what the demo shows is the encoder "
        "before and after pretraining.\n\n"
        f"Reconstructions of a part of the photographs never seen in training: {picture}\n"
        f"Both runs in MLflow:\n  {how_to_watch(runs, TrackConfig())}\n"
        "In your shell, `. .venv/bin/activate` puts mae-dist and mlflow on the path after `make demo`."
    )
