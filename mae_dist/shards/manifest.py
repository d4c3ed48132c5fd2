"""What there is: the shards of a directory, their counts and sizes, and where each sample lies inside them.

`manifest.json` lists the shards; beside it lies `NAME.idx.npy` for each `NAME.tar`, an int64 table of one row a sample
(offset and length of the image's bytes in the tar, label or -1). Counts alone decide the order; only reading touches
the tables. The tars lie in the same directory, or anywhere: then their names are URLs or absolute paths.
`_info.json` (timm), `sizes.json` (open_clip) and `wids.json` (wids) say the same to other readers.

Nothing of it is believed unseen: the manifest holds a checksum of each table and a seal, the checksum of the rest of
itself. Sizes are looked at when a manifest is loaded, a table's bytes when a process first opens it, and before the
first step all tables, shared out among the ranks. Version 1 has no checksums.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from posixpath import normpath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mae_dist.errors import UserError, unreadable
from mae_dist.local import regular, write_file
from mae_dist.shards import remote
from mae_dist.shards.tar import Digested

FILE_NAME = "manifest.json"
SEALED, UNSEALED = 2, 1  # versions
TABLE_HEADER, ROW_BYTES = 128, 24  # of a table, as np.save writes it
HASHES = {"sha256": 64, "index_sha256": 64, "md5": 32}  # hex digits


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
    index_sha256: str = ""
    """Of the index; empty: made before there were checksums."""

    @staticmethod
    def of(whole: Digested, name: str, table: bytes) -> "Shard":
        """The entry of a tar that is read to its end. `table`: its index."""
        while whole.read(1 << 20):
            pass
        count = (len(table) - TABLE_HEADER) // ROW_BYTES
        sums = whole.sha256.hexdigest(), whole.md5.hexdigest()
        return Shard(name, count, whole.num_bytes, *sums, index_sha256=hashlib.sha256(table).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The shards of one directory, or a part of them."""

    directory: Path
    shards: Sequence[Shard]
    classes: Sequence[str] = field(default=())
    """Class names by label; empty when the samples have none."""
    _checked: set[int] = field(default_factory=set, init=False, compare=False, repr=False)
    """Shards whose tables this process has looked at."""

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

    @property
    def is_sealed(self) -> bool:
        """Whether there are checksums of all tables."""
        return all(shard.index_sha256 for shard in self.shards)

    def table(self, shard: int) -> NDArray[np.int64]:
        """Offset, length and label of each sample, (count, 3).

        Raises UserError when it cannot be read, or is not the one that belongs to this manifest.
        """
        try:
            return self._table(shard)
        except OSError as error:
            raise unreadable(error, f"{self.index_path(shard)}: {error.strerror}") from error

    def look_at(self, shard: int) -> None:
        """The first time, look whether its table is the right one. Raises UserError if not, OSError if it cannot."""
        if shard not in self._checked:
            self._table(shard)

    def _table(self, shard: int) -> NDArray[np.int64]:
        path = self.index_path(shard)
        try:
            table = check_table(regular(path).read_bytes(), self.shards[shard])
        except ValueError as error:
            raise UserError(f"{path}: {error}; copy it again, or {self._anew()}") from error
        self._checked.add(shard)
        return table

    def _anew(self) -> str:
        return f"make it anew: mae-dist index {self.directory}"

    def split(self, held_out: int) -> tuple["Manifest", "Manifest"]:
        """All but the last `held_out` shards, and those. Raises UserError when nothing would be left to train on."""
        if not 0 < held_out < len(self.shards):
            most = len(self.shards) - 1
            number = f"write a number from 1 to {most}, or make" if most > 1 else "write 1, or make" if most else "make"
            raise UserError(
                f"data.val_shards: cannot hold out {held_out} of the {len(self.shards)} shards in {self.directory}; "
                f"{number} more shards with mae-dist shard --shard-size"
            )
        cut = len(self.shards) - held_out
        return (
            Manifest(self.directory, self.shards[:cut], self.classes),
            Manifest(self.directory, self.shards[cut:], self.classes),
        )

    def save(self, keep_others: bool = False) -> None:
        """Write `manifest.json` and what it says for other readers (`keep_others`: unless theirs are there already)."""
        ours = self._written() if keep_others else {}
        for name, content in self._translations().items():
            if not (keep_others and (self.directory / name).exists()) or name in ours:
                write_file(self.directory / name, json.dumps(content, indent=1) + "\n")
        write_file(self.directory / FILE_NAME, self.text())  # the last: then all is there

    def _written(self) -> set[str]:
        """Files for other readers that say what the manifest in this directory does: they were written with it."""
        found = set()
        with suppress(OSError, UserError):
            text = (self.directory / FILE_NAME).read_bytes()
            before = Manifest.parse(text, self.directory, FILE_NAME, sealed=False)
            for name, content in before._translations().items():
                with suppress(OSError, ValueError, RecursionError):
                    if json.loads((self.directory / name).read_bytes()) == content:
                        found.add(name)
        return found

    def text(self) -> str:
        """The content of `manifest.json`."""
        shards = [asdict(shard) for shard in self.shards]
        listing: dict[str, Any] = {"version": SEALED, "classes": list(self.classes), "shards": shards}
        if not self.is_sealed:
            listing["version"] = UNSEALED
            for entry in shards:
                del entry["index_sha256"]
        else:
            listing["seal"] = seal_of(listing)
        return json.dumps(listing, indent=1) + "\n"

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
        try:
            text = regular(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{directory}: no {FILE_NAME} here; make shards with: mae-dist shard IMAGES {directory}"
            ) from None
        except OSError as error:
            raise unreadable(error, f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        manifest = Manifest.parse(text, directory, str(path))
        if check:
            manifest.check_files()
        return manifest

    def check_files(self) -> None:
        """Raise UserError for a file that is missing or cut short, as far as it lies on this machine."""
        for i in range(len(self.shards)):
            self._check_shard(i)

    @staticmethod
    def parse(text: str | bytes, directory: Path, place: str, sealed: bool = True) -> "Manifest":
        """The content of `manifest.json`, which came from `place`. Raises UserError when it is not one.

        `sealed` False: also when its seal is of other content.
        """
        try:
            listing = json.loads(text)
            check_listing(listing)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place}: not a manifest of mae-dist ({error}); copy it again, or shard the images again"
            ) from error
        if sealed and "seal" in listing and listing["seal"] != seal_of(listing):
            raise UserError(
                f"{place}: changed since it was written (its seal is of other content); copy it again, or, if it is as "
                f"it should be, seal it again: mae-dist index {directory}"
            )
        return Manifest(directory, [Shard(**entry) for entry in listing["shards"]], listing["classes"])

    def _check_shard(self, i: int) -> None:
        """Whether its files are there, at their sizes."""
        shard = self.shards[i]
        again = f"copy it again, or {self._anew()}"
        check_size(self.index_path(i), TABLE_HEADER + ROW_BYTES * shard.count, f"{FILE_NAME} means", again)
        if not remote.is_remote(shard.name):
            again = "copy it again, or shard the images again"
            check_size(self.tar_path(i), shard.num_bytes, "the manifest says", again)


def check_size(path: Path, expected: int, says: str, advice: str) -> None:
    """Raises UserError unless a file is there and has so many bytes."""
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: missing, but listed in {FILE_NAME}; {advice}") from None
    except OSError as error:
        raise unreadable(error, f"{path}: {error.strerror}") from error
    if size != expected:
        kind = "cut short" if size < expected else "longer than written"
        raise UserError(f"{path}: {kind}, {size} bytes where {says} {expected}; {advice}")


def table_bytes(rows: ArrayLike) -> bytes:
    """The content of an index: (n, 3) int64 rows of offset, length and label."""
    content = io.BytesIO()
    np.save(content, np.asarray(rows, dtype=np.int64).reshape(-1, 3))
    return content.getvalue()


def with_checksum(shard: Shard, index: Path, moved_to: Path) -> Shard:
    """A shard with the checksum of its index, which may have moved; one that has it as it is. Raises OSError."""
    if shard.index_sha256:
        return shard
    content = (index if index.exists() else moved_to / index.name).read_bytes()
    return replace(shard, index_sha256=hashlib.sha256(content).hexdigest())


def check_table(content: bytes, shard: Shard) -> NDArray[np.int64]:
    """The rows of an index. Raises ValueError, saying what is wrong, unless it is that of this shard."""
    if shard.index_sha256 and hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise ValueError(f"damaged, or of other shards: its checksum is not the one in {FILE_NAME}")
    try:
        table = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # EOFError, SyntaxError, ...: headers are Python
        raise ValueError(f"damaged: {' '.join(str(error).split())}") from None
    if (
        not isinstance(table, np.ndarray)
        or table.dtype != np.int64
        or table.shape != (shard.count, 3)
        or not table.flags.c_contiguous
        or len(content) != TABLE_HEADER + table.nbytes
    ):
        raise ValueError(f"damaged, or of other shards: not {shard.count} rows of offset, length and label")
    ranges = table[:, :2]
    if len(table) and (
        ranges.min() < 0 or ranges.max() > shard.num_bytes or ranges.sum(axis=1).max() > shard.num_bytes
    ):
        raise ValueError("damaged, or of other shards: images lie outside the tar")
    if overlaps(ranges):
        raise ValueError("damaged, or of other shards: images lie over each other")
    return table


def overlaps(ranges: NDArray[np.int64]) -> bool:
    """Whether any of the (n, 2) offsets and lengths overlap; not those that are equal, as links in a tar make them."""
    if (ranges[:-1].sum(axis=1) <= ranges[1:, 0]).all():
        return False
    ranges = np.unique(ranges, axis=0)
    return bool((ranges[:-1].sum(axis=1) > ranges[1:, 0]).any())


def seal_of(listing: dict[str, Any]) -> str:
    """The checksum of all that a manifest says but for the seal itself, however it is spaced."""
    content = {key: value for key, value in listing.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_listing(listing: Any) -> None:
    """Raises ValueError, saying what is wrong, unless all of a manifest has the right form."""
    if not isinstance(listing, dict) or not {"version", "classes", "shards"} <= listing.keys():
        raise ValueError("no version, classes and shards")
    version, classes, shards = listing["version"], listing["classes"], listing["shards"]
    if type(version) is not int or version not in (SEALED, UNSEALED):
        raise ValueError(f"version {version!r}, this mae-dist reads {UNSEALED} and {SEALED}")
    if unknown := listing.keys() - {"version", "classes", "shards"} - ({"seal"} if version == SEALED else set()):
        raise ValueError(f"unknown key {min(unknown)!r}")
    if version == SEALED and not is_hash(listing.get("seal"), 64):
        raise ValueError(f"no seal, which version {SEALED} has")
    if not isinstance(classes, list) or not all(map(is_text, classes)):
        raise ValueError("classes is no list of names")
    if not isinstance(shards, list) or not shards:
        raise ValueError("shards is no list of shards")
    known = {key.name for key in fields(Shard)} - ({"index_sha256"} if version == UNSEALED else set())
    for n, entry in enumerate(shards):
        if what := wrong_in(entry, known, version):
            raise ValueError(f"shard {n}: {what}")
    if not any(entry["count"] for entry in shards):
        raise ValueError("no sample in any shard")
    names = {entry["name"] if remote.is_remote(entry["name"]) else normpath(entry["name"]) for entry in shards}
    if len(names) < len(shards):
        raise ValueError("a shard is listed twice")


def wrong_in(entry: Any, known: set[str], version: int) -> str:
    """What is wrong with the entry of a shard, of these keys; empty when nothing is."""
    if (
        not isinstance(entry, dict)
        or entry.keys() - known
        or not {"name", "count", "num_bytes", "sha256"} <= entry.keys()
    ):
        return f"not an entry of {', '.join(sorted(known))}"
    for key in ("count", "num_bytes"):
        if type(entry[key]) is not int or not 0 <= entry[key] < 1 << 62:
            return f"{key} {str(entry[key])[:40]} is no number from 0"
    for key in ("name", "index"):
        if not is_text(entry.get(key, "")) or "\0" in entry.get(key, ""):
            return f"{key} is no name"
    index = entry.get("index", "")
    if index != Path(index).name or index == "..":
        return f"its index {index!r} lies outside"
    for key, length in HASHES.items():
        given = entry.get(key, "")
        if not is_hash(given, length) and not (given == "" and not (key == "index_sha256" and version == SEALED)):
            return f"{key} is no checksum"
    return "" if entry["name"] else "no name"


def is_text(value: Any) -> bool:
    """Whether it can be a file's name, or printed: JSON can say halves of characters, which cannot."""
    try:
        os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        return False
    return isinstance(value, str)


def is_hash(value: Any, length: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", value) is not None


def index_name(place: str) -> str:
    """File name of a tar's index: the last part of its place that can be a file name, `.idx.npy` for `.tar`."""
    words = re.findall(r"[\w.-]*\w", place)
    tars = [word for word in words if word.endswith(".tar")]
    return (tars or words or ["shard"])[-1].removesuffix(".tar") + ".idx.npy"
