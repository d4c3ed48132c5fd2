"""What there is: the shards of a directory, their counts and sizes, and where each sample lies inside them.

`manifest.json` lists the shards; beside it lies `NAME.idx.npy` for each `NAME.tar`, an int64 table of one row a sample
(offset and length of the image's bytes in the tar, label or -1). Counts alone decide the order; only reading touches
the tables. The tars lie in the same directory, or anywhere: then their names are URLs or absolute paths.
`_info.json` (timm), `sizes.json` (open_clip) and `wids.json` (wids) say the same to other readers.
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
from mae_dist.shards.tar import Digested

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
    md5: str = ""
    """For wids; empty: not known."""
    index: str = ""
    """File name of the index beside the manifest; empty: that of the tar, `.idx.npy` for `.tar`."""

    @staticmethod
    def of(path: Path, name: str, count: int) -> "Shard":
        """The entry of a tar on disk, read once for both checksums."""
        with path.open("rb") as file:
            whole = Digested(file)
            while whole.read(1 << 20):
                pass
        return Shard(name, count, whole.num_bytes, whole.sha256.hexdigest(), whole.md5.hexdigest())


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

    def save(self, keep_others: bool = False) -> None:
        """Write `manifest.json` and what it says for other readers (`keep_others`: unless theirs are there already)."""
        listing = {
            "version": VERSION,
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }
        for name, content in self._translations().items():
            if not (keep_others and (self.directory / name).exists()):
                (self.directory / name).write_text(json.dumps(content, indent=1) + "\n")
        (self.directory / FILE_NAME).write_text(json.dumps(listing, indent=1) + "\n")

    def _translations(self) -> dict[str, dict]:
        """The same for wids, and, for readers that want the tars beside it, timm and open_clip."""
        names = [shard.name for shard in self.shards]
        lengths = [shard.count for shard in self.shards]
        entries = [
            {"url": s.name, "nsamples": s.count, "filesize": s.num_bytes} | ({"md5sum": s.md5} if s.md5 else {})
            for s in self.shards
        ]
        wids = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "train", "shardlist": entries}
        if any(self.place(i) != str(self.directory / name) for i, name in enumerate(names)):
            return {"wids.json": wids}
        split = {"name": "train", "num_samples": self.num_samples, "filenames": names, "shard_lengths": lengths}
        return {
            "wids.json": wids,
            "_info.json": {"splits": {"train": split}},
            "sizes.json": dict(zip(names, lengths, strict=True)),
        }

    @staticmethod
    def load(directory: str | Path, check: bool = True) -> "Manifest":
        """Read a directory of shards and check that every file is there at its full size (remote ones: when fetched).

        `check`: look at the files too, not only at the manifest.
        Raises UserError, naming the file, when the manifest is missing or broken or a shard is missing or cut short.
        """
        directory = Path(directory)
        path = directory / FILE_NAME
        if not path.is_file():
            raise UserError(f"{directory}: no {FILE_NAME} here; make shards with: mae-dist shard IMAGES {directory}")
        manifest = Manifest.parse(path.read_text(), directory, str(path))
        for i in range(len(manifest.shards) if check else 0):
            manifest._check_shard(i)
        return manifest

    @staticmethod
    def parse(text: str | bytes, directory: Path, place: str) -> "Manifest":
        """The content of `manifest.json`, which came from `place`. Raises UserError when it is not one."""
        try:
            listing = json.loads(text)
            manifest = Manifest(directory, [Shard(**entry) for entry in listing["shards"]], listing["classes"])
            version = listing["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place}: not a manifest of mae-dist ({error!r}); shard the images again") from error
        if version != VERSION:
            raise UserError(f"{place}: version {version}, this mae-dist reads {VERSION}; shard again")
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
