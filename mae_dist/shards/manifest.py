"""What there is: the shards of a directory, their counts and sizes, and where each sample lies inside them.

`manifest.json` lists the shards; beside it lies `NAME.idx.npy` for each `NAME.tar`, an int64 table of one row a sample
(offset and length of the image's bytes in the tar, label or -1). Counts alone decide the order; only reading touches
the tables. The tars lie in the same directory, or anywhere: then their names are URLs or absolute paths.
`_info.json` (timm) and `sizes.json` (open_clip) say the same to other readers.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.shards import remote

FILE_NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    name: str
    """File name of the tar beside the manifest, or its place when it lies elsewhere: URL, `pipe:` or absolute path."""
    count: int
    """Samples in it."""
    num_bytes: int
    sha256: str
    index: str = ""
    """File name of the index beside the manifest; empty: that of the tar, `.idx.npy` for `.tar`."""


@dataclass(frozen=True)
class Manifest:
    """The shards of one directory, or a part of them."""

    directory: Path
    shards: Sequence[Shard]
    classes: Sequence[str] = field(default=())
    """Class names by label; empty when the samples have none."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples in each shard, (S,) int64."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def digest(self) -> str:
        """16 hex digits that change when any shard's content, or their order, does."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]

    def place(self, shard: int) -> str:
        """Where the tar lies: a local path, or what `remote.open_stream` takes."""
        return remote.join(str(self.directory), self.shards[shard].name)

    def tar_path(self, shard: int) -> Path:
        """`place` of a shard on this machine's file system."""
        return Path(self.place(shard))

    def index_path(self, shard: int) -> Path:
        return self.directory / (self.shards[shard].index or index_name(self.shards[shard].name))

    def split(self, held_out: int) -> tuple["Manifest", "Manifest"]:
        """All but the last `held_out` shards, and those. Raises UserError when nothing would be left to train on."""
        if not 0 < held_out < len(self.shards):
            raise UserError(
                f"data.val_shards: cannot hold out {held_out} of the {len(self.shards)} shards in {self.directory}; "
                f"write a number from 1 to {len(self.shards) - 1}, or make more shards with mae-dist shard --shard-size"
            )
        cut = len(self.shards) - held_out
        return (
            Manifest(self.directory, self.shards[:cut], self.classes),
            Manifest(self.directory, self.shards[cut:], self.classes),
        )

    def save(self) -> None:
        """Write `manifest.json` and its two translations for timm and open_clip."""
        listing = {
            "version": VERSION,
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }
        names = [shard.name for shard in self.shards]
        lengths = [shard.count for shard in self.shards]
        split = {"name": "train", "num_samples": self.num_samples, "filenames": names, "shard_lengths": lengths}
        (self.directory / "sizes.json").write_text(json.dumps(dict(zip(names, lengths, strict=True)), indent=1) + "\n")
        (self.directory / "_info.json").write_text(json.dumps({"splits": {"train": split}}, indent=1) + "\n")
        (self.directory / FILE_NAME).write_text(json.dumps(listing, indent=1) + "\n")

    @staticmethod
    def load(directory: str | Path) -> "Manifest":
        """Read a directory of shards and check that every file is there at its full size (remote ones: when fetched).

        Raises UserError, naming the file, when the manifest is missing or broken or a shard is missing or cut short.
        """
        directory = Path(directory)
        path = directory / FILE_NAME
        if not path.is_file():
            raise UserError(f"{directory}: no {FILE_NAME} here; make shards with: mae-dist shard IMAGES {directory}")
        try:
            listing = json.loads(path.read_text())
            shards = [Shard(**entry) for entry in listing["shards"]]
            manifest = Manifest(directory, shards, listing["classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a manifest of mae-dist ({error!r}); shard the images again") from error
        if listing["version"] != VERSION:
            raise UserError(f"{path}: version {listing['version']}, this mae-dist reads {VERSION}; shard again")
        for i in range(len(shards)):
            manifest._check_shard(i)
        return manifest

    def _check_shard(self, i: int) -> None:
        shard, tar = self.shards[i], self.tar_path(i)
        advice = "copy it again, or shard the images again"
        if not self.index_path(i).is_file():
            raise UserError(f"{self.index_path(i)}: missing; {advice}")
        if remote.is_remote(shard.name):
            return
        if not tar.is_file():
            raise UserError(f"{tar}: missing, but listed in {self.directory / FILE_NAME}; {advice}")
        size = tar.stat().st_size
        if size != shard.num_bytes:
            kind = "cut short" if size < shard.num_bytes else "longer than written"
            raise UserError(f"{tar}: {kind}, {size} bytes where the manifest says {shard.num_bytes}; {advice}")


def index_name(place: str) -> str:
    """File name of a tar's index: the last part of its place that can be a file name, `.idx.npy` for `.tar`."""
    words = re.findall(r"[\w.-]*\w", place)
    tars = [word for word in words if word.endswith(".tar")]
    return (tars or words or ["shard"])[-1].removesuffix(".tar") + ".idx.npy"
