"""How fast images reach the trainer: loaders side by side, on the same images, with the same number of processes.

- (a) imagefolder: torchvision's ImageFolder and the official transform (float32), a DataLoader.
- (b) webdataset: plain webdataset, decode("pil") and the same transform, from our shards.
- (c) ours, from the same shards.
- (d) ours, from shards whose images were resized to shortest side 256 beforehand.
- (c0) the same views through torch's DataLoader instead of the shared ring.
- (c4) ours, with 4 views of each sample (data.repeated_aug).
- (c2), (d2) ours with data.decoder region, where TurboJPEG >= 3 is installed.

Each reads one epoch a round and they take turns within a round, so a busy machine slows all of them alike; workers
start before the clock does. Then, in one process: where the time goes, and PSNR of our crops against PIL's.

    python benchmarks/loader.py --images DIR [--workers 2] [--rounds 5] [--samples 2048] [--out F.json]
"""

import argparse
import gc
import io
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mae_dist.data import DataConfig, ImageStream, open_sources
from mae_dist.data.augment import finish, random_views, resize
from mae_dist.data.decode import cut, decode
from mae_dist.data.turbojpeg import library
from mae_dist.errors import UserError
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.write import shard

SIZE, BATCH = (224, 224), 64
Loader = Callable[[], Iterator[Any]]


def official_transform() -> transforms.Compose:
    """main_pretrain.py of facebookresearch/mae."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )


def prepare(images: Path, work: Path, samples: int) -> tuple[Path, Path, Path]:
    """An ImageFolder of `samples` files (the images again and again), its shards, its shards at shortest side 256."""
    sources = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not sources:
        raise UserError(f"{images}: no JPEGs here")
    folder, small = work / "full", work / "small"
    for directory in (folder / "x", small / "x"):
        directory.mkdir(parents=True)
    smaller = [shortest_256(path.read_bytes()) for path in sources]
    for i in range(samples):
        shutil.copyfile(sources[i % len(sources)], folder / "x" / f"{i:06d}.jpg")
        (small / "x" / f"{i:06d}.jpg").write_bytes(smaller[i % len(sources)])
    for directory in (folder, small):
        shard(directory, work / f"{directory.name}-shards", shard_size=256)
    return folder, work / "full-shards", work / "small-shards"


def shortest_256(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        scale = 256 / min(image.size)
        if scale >= 1:
            return data
        size = (round(image.width * scale), round(image.height * scale))
        out = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
        return out.getvalue()


def imagefolder(folder: Path, workers: int) -> Loader:
    data = ImageFolder(str(folder), official_transform())
    return lambda: iter(
        DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    )  # fmt: skip


def plain_webdataset(shards: Path, workers: int) -> Loader:
    import webdataset

    manifest, transform = Manifest.load(shards), official_transform()
    tars = [str(shards / s.name) for s in manifest.shards]

    def start() -> Iterator[Any]:
        data = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).decode("pil")  # type: ignore
        data = data.to_tuple("jpg", "cls").map_tuple(transform, lambda label: label)
        return iter(webdataset.WebLoader(data.batched(BATCH), batch_size=None, num_workers=workers))  # type: ignore

    return start


def ours(shards: Path, workers: int, decoder: Any = "fast", views: int = 1) -> Loader:
    config = DataConfig(shards=str(shards), workers=workers, decoder=decoder, repeated_aug=views)
    source = open_sources(config, SIZE, 3)[0]
    return lambda: iter(ImageStream(source, SIZE, config, seed=0, global_batch_size=BATCH))


class WholeBatches(Dataset):
    """Our views for torch's DataLoader: a worker makes a whole batch and sends it."""

    def __init__(self, stream: ImageStream):
        self.views = stream.views

    def __getitems__(self, positions: np.ndarray) -> list[torch.Tensor]:
        table = self.views.table(positions)
        images = torch.empty((len(table), 3, *SIZE), dtype=torch.uint8, memory_format=torch.channels_last)
        self.views.fill(table, images)
        return [images, torch.from_numpy(table)]


def through_dataloader(shards: Path, workers: int) -> Loader:
    config = DataConfig(shards=str(shards), workers=workers)
    stream = ImageStream(open_sources(config, SIZE, 3)[0], SIZE, config, seed=0, global_batch_size=BATCH)

    def start() -> Iterator[Any]:
        positions: Any = stream.positions()
        data = WholeBatches(stream)
        return iter(DataLoader(data, batch_sampler=positions, collate_fn=lambda batch: batch, num_workers=workers))

    return start


def cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure_one(start: Loader, samples: int) -> tuple[float, float]:
    """Images a second, and milliseconds of CPU an image over all processes (steadier on a busy machine)."""
    before = cpu_seconds()
    rate = images_per_s(start, samples)
    gc.collect()  # a DataLoader's workers end with its iterator
    return rate, 1000 * (cpu_seconds() - before) / samples


def images_per_s(start: Loader, samples: int) -> float:
    """From the first batch, so that starting processes does not count, to one epoch later."""
    batches = start()
    next(batches)
    began, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch[0])
        if seen >= samples - 2 * BATCH:
            break
    elapsed = time.perf_counter() - began
    if hasattr(batches, "close"):
        batches.close()
    return seen / elapsed


def milliseconds(data: list[bytes]) -> dict[str, float]:
    """Of one image in one process: our steps, and the official transform in whole."""
    config, spent = DataConfig(), dict.fromkeys(("decode", "box", "resize", "flip_copy"), 0.0)
    out = torch.empty((1, 3, *SIZE), dtype=torch.uint8, memory_format=torch.channels_last)[0]
    views = random_views(np.zeros(len(data)), np.arange(len(data)), config, 0)  # workers draw 8 at once: 3 us an image
    with torch.inference_mode():
        for i, encoded in enumerate(data):
            times = [time.perf_counter()]
            pixels = simplejpeg.decode_jpeg(encoded)
            times.append(time.perf_counter())
            crop = cut(pixels, views[i].choose)
            times.append(time.perf_counter())
            image = resize(crop, SIZE)
            times.append(time.perf_counter())
            out.copy_(image.flip(-1) if views[i].flip else image)
            times.append(time.perf_counter())
            for name, seconds in zip(spent, np.diff(times), strict=True):
                spent[name] += seconds
    began, transform = time.perf_counter(), official_transform()
    for encoded in data:
        transform(Image.open(io.BytesIO(encoded)).convert("RGB"))
    spent["official"] = time.perf_counter() - began
    return {name: round(1000 * float(seconds) / len(data), 3) for name, seconds in spent.items()}


def psnr(data: list[bytes]) -> dict[str, float]:
    """Decibels of our crops against PIL's decoding, crop and antialiased bicubic."""
    fast, pil = DataConfig(), DataConfig(decoder="pil")
    found = []
    for i, encoded in enumerate(data):
        (view,) = random_views(0, i, fast, 0)
        a, b = (
            finish(decode(encoded, 3, view.choose, config.decoder), view, SIZE, config).double()
            for config in (fast, pil)
        )
        found.append(10 * np.log10(255**2 / max(1e-9, float(((a - b) ** 2).mean()))))
    return {"mean": round(float(np.mean(found)), 1), "min": round(float(np.min(found)), 1)}


def has_region_decoding() -> bool:
    try:
        library()
    except UserError:
        return False
    return True


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder, full, small = prepare(arguments.images, work, arguments.samples)
    workers = arguments.workers
    loaders = {
        "a imagefolder": imagefolder(folder, workers),
        "b webdataset": plain_webdataset(full, workers),
        "c0 ours, DataLoader": through_dataloader(full, workers),
        "c ours": ours(full, workers),
        "c4 ours, 4 views": ours(full, workers, views=4),
        **({"c2 ours, region": ours(full, workers, "region")} if has_region_decoding() else {}),
        "d ours, shortest 256": ours(small, workers),
        **({"d2 ours, 256, region": ours(small, workers, "region")} if has_region_decoding() else {}),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    cpu: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.rounds):
        for name, start in loaders.items():
            rate, milliseconds_used = measure_one(start, arguments.samples)
            rates[name].append(rate)
            cpu[name].append(milliseconds_used)
    median = {name: statistics.median(values) for name, values in rates.items()}
    paired = {
        name: statistics.median(x / y for x, y in zip(values, rates["a imagefolder"], strict=True))
        for name, values in rates.items()
    }
    data = [path.read_bytes() for path in sorted((folder / "x").iterdir())[:256]]
    sizes = [len(encoded) for encoded in data]
    return {
        "images": {"samples": arguments.samples, "mean_bytes": round(statistics.mean(sizes))},
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "workers": workers},
        "images_per_s": {name: [round(v) for v in values] for name, values in rates.items()},
        "median": {name: round(v) for name, v in median.items()},
        "per_worker": {name: round(v / workers) for name, v in median.items()},
        "ratio_to_a": {name: round(v, 2) for name, v in paired.items()},
        "cpu_ms_an_image": {name: round(statistics.median(values), 2) for name, values in cpu.items()},
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "milliseconds_an_image": milliseconds(data),
        "psnr_against_pil_db": psnr(data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a directory of JPEGs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2048, help="images an epoch; the given ones repeat")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as work:
        result = measure(arguments, Path(work))
    print(f"{'loader':24}{'images/s':>10}{'a worker':>10}{'vs (a)':>8}{'CPU ms':>8}{'vs (a)':>8}   rounds")
    cpu = result["cpu_ms_an_image"]
    for name, rate in result["median"].items():
        rounds = " ".join(map(str, result["images_per_s"][name]))
        print(
            f"{name:24}{rate:10}{result['per_worker'][name]:10}{result['ratio_to_a'][name]:8.2f}"
            f"{cpu[name]:8.2f}{cpu['a imagefolder'] / cpu[name]:8.2f}   {rounds}"
        )
    for name in ("milliseconds_an_image", "psnr_against_pil_db"):
        print(f"{name}: {result[name]}")
    command = (
        f"python benchmarks/loader.py --images DIR --workers {arguments.workers} --rounds {arguments.rounds} "
        f"--samples {arguments.samples}"
    )
    arguments.out.write_text(json.dumps({"command": command} | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
