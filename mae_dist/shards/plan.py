"""Which image goes into which shard, at which place: written down once, before any shard is.

The plan depends only on the images and the recipe, so it does not matter how many processes, machines and restarts
carry it out. It lies in a directory: `plan.json` (last, so it is whole when it is there), `rows` (N x 5 int64:
container, place, place, label, whether the key needs a hash) and `names` (the images' origins, end to end; `ends.npy`
says where). The shuffle is not stored: `permute` computes which image comes to a place.

Cost for N = 10^8 images: while planning 8 N bytes for the ends, 24 N for finding equal keys, 40 N of mapped rows that
the kernel may take back (58 bytes an image measured, all told: 6 GB) and the names of the largest folder; on disk 48 N
bytes and the names, 8 to 15 GB. Those who carry it out map the files and touch the rows of their own shards only.
"""

import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from mae_dist import rng
from mae_dist.errors import UserError
from mae_dist.local import fsync, write_file
from mae_dist.shards.convert import Conversion
from mae_dist.shards.encoded import MAX_PIXELS
from mae_dist.shards.inputs import Input
from mae_dist.shards.label_file import read_labels
from mae_dist.shards.labels import of_unlabelled
from mae_dist.shards.notes import ALIKE, BY_TEXT, IN_FOLDERS, Notes
from mae_dist.shards.order import permute
from mae_dist.shards.sources import stamps
from mae_dist.shards.tars import Piece

PLAN_STREAM = 0x706C616E
MAX_KEY = 90  # a tar header holds names of 100 characters
COLUMNS = 5
NAMED_CLASSES = 1_000_000  # a label beyond is an id of something: its number is name enough, and no list goes up to it
NOT_IN_KEYS = re.compile(r"[^!-~]|[./?]")


@dataclass(frozen=True)
class Recipe:
    """All that decides the bytes of the shards, besides the images."""

    images: str
    labels: str | None = None
    shard_size: int = 1000
    seed: int = 0
    conversion: Conversion = field(default_factory=Conversion)
    pillow: str = PIL.__version__
    """Its version: another one may encode other bytes."""
    all_suffixes: bool = False
    """Take what begins as an image does, whatever it is called."""
    image_column: str | None = None
    label_column: str | None = None
    """Of parquet files; None: `image` and `label`."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UserError(f"--shard-size must be at least 1, not {self.shard_size}")

    def text(self, sources: Mapping[str, str] | None = None) -> str:
        """As JSON. `sources`: what `Plan` has of them, under a name of its own."""
        recipe = asdict(self)
        if self.conversion.max_pixels == MAX_PIXELS:  # as recipes were before it could be chosen
            del recipe["conversion"]["max_pixels"]
        for name in ("all_suffixes", "image_column", "label_column"):
            if not recipe[name]:
                del recipe[name]
        return json.dumps(recipe | ({"sources": sources} if sources else {}), indent=1) + "\n"

    def reading(self) -> dict[str, Any]:
        """How `recognise` is to take the images."""
        names = ("all_suffixes", "image_column", "label_column")
        return {"has_labels": bool(self.labels)} | {name: getattr(self, name) for name in names}


class Item(NamedTuple):
    container: int
    origin: str
    place: tuple[int, int]
    label: int
    key: str
    """Unique, without dots or slashes: webdataset cuts keys at the first dot."""


@dataclass(frozen=True)
class Plan:
    directory: Path
    recipe: Recipe
    kind: str
    root: str
    containers: list[str]
    classes: list[str]
    count: int
    bad: list[str]
    """What was wrong with the input's files themselves: a tar that is cut short."""
    notes: Notes = field(default_factory=Notes)
    """What of the input is not used."""
    sources: dict[str, str] = field(default_factory=dict)
    """What it was made from, as `sources.stamps` has it; empty in plans of earlier versions."""
    out: str = ""
    """A remote OUT, without secrets; empty for a local one, beside which the plan lies."""
    mark: str = ""
    """Says in a remote OUT that it is being made from here (see `publish.claim`)."""

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.recipe.shard_size)

    def shard_name(self, shard: int) -> str:
        return f"train-{shard:0{max(5, len(str(self.num_shards)))}d}"

    def items(self, shard: int) -> list[Item]:
        """The images of a shard, in their places."""
        start = shard * self.recipe.shard_size
        return self.items_at(np.arange(start, min(start + self.recipe.shard_size, self.count)))

    def items_at(self, places: NDArray[np.int64]) -> list[Item]:
        """The images at these places of the shuffled line, (n,) int64."""
        key = rng.fold(self.recipe.seed ^ PLAN_STREAM, np.zeros(1, np.int64))
        ids = permute(places, np.full(len(places), self.count), np.repeat(key, len(places)))
        return [self._item(i) for i in ids.tolist()]

    def _item(self, i: int) -> Item:
        container, first, second, label, hashed = self._rows[i].tolist()
        start = int(self._ends[i - 1]) if i else 0
        origin = os.fsdecode(self._names[start : int(self._ends[i])].tobytes())
        key = hashed_key(origin, container) if hashed else plain_key(origin)
        return Item(container, origin, (first, second), label, key)

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        return np.memmap(self.directory / "rows", np.int64, "r").reshape(-1, COLUMNS)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.load(self.directory / "ends.npy", mmap_mode="r")

    @cached_property
    def _names(self) -> NDArray[np.uint8]:
        return np.memmap(self.directory / "names", np.uint8, "r")

    def class_name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)

    @staticmethod
    def load(directory: Path) -> "Plan | None":
        """The plan of an earlier start; None when there is none, or none that is whole."""
        try:
            content = json.loads((directory / "plan.json").read_text())
            recipe = content.pop("recipe")
            recipe["conversion"] = Conversion(**recipe["conversion"])
            notes = Notes(content.pop("notes", {}))
            return Plan(directory, Recipe(**recipe), **content, notes=notes)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{directory / 'plan.json'}: damaged ({error!r}); remove {directory.parent} to begin anew"
            ) from None


def make_plan(
    directory: Path, recipe: Recipe, source: Input, pieces: Iterable[Piece], out: str = "", mark: str = ""
) -> Plan:
    """Write down all images of an input. Raises UserError when there are none, or when the labels file does not fit."""
    ends, hashes, bad, notes = array("q"), array("q"), [], source.notes
    directories = [path for path in (recipe.images, source.root) if Path(path).is_dir()]
    sources = stamps(directories, source.containers, recipe.labels)
    with (directory / "rows").open("wb") as rows, (directory / "names").open("wb") as names:
        for piece in pieces:
            bad += piece.bad
            notes.update_from(piece.notes)
            sources |= stamps(piece.folders.values(), (), None)
            _append(piece, rows, names, ends, hashes)
    if not ends:
        found = "; ".join((*bad[:1], *notes.lines()))
        raise UserError(f"{recipe.images}: no images in it" + (f" ({found})" if found else ""))
    np.save(directory / "ends.npy", np.frombuffer(ends, dtype=np.int64))
    table = np.memmap(directory / "rows", np.int64, "r+", shape=(len(ends), COLUMNS))
    _mark_equal(np.frombuffer(hashes, dtype=np.int64), table[:, 4])
    classes = source.classes
    if recipe.labels:
        blob = (directory / "names").read_bytes()
        origins = [os.fsdecode(blob[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        table[:, 3], classes = read_labels(Path(recipe.labels), origins, recipe.images)
        notes.pop(IN_FOLDERS, None)
    note_classes(classes, notes)
    highest = int(table[:, 3].max())
    if len(classes) <= highest < NAMED_CLASSES:
        classes = [*classes, *map(str, range(len(classes), highest + 1))]
    table.flush()
    notes = of_unlabelled(notes, 0 if recipe.labels else len(ends))
    plan = Plan(
        directory,
        recipe,
        source.kind,
        source.root,
        source.containers,
        classes,
        len(ends),
        bad,
        notes,
        sources,
        out,
        mark,
    )
    content = {key: value for key, value in asdict(plan).items() if key != "directory"}
    for name in ("rows", "names", "ends.npy"):
        fsync(directory / name)
    write_file(directory / "plan.json", json.dumps(content, indent=1))
    return plan


def note_classes(classes: Sequence[str], notes: Notes) -> None:
    """Count names that are likely one class, and numbers that are not their own labels."""
    first: dict[str, str] = {}
    for name in classes:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if first.setdefault(plain, name) != name:
            notes.add(ALIKE, f"{name!r} and {first[plain]!r}")
    if all(map(str.isdecimal, classes)):
        for label, name in enumerate(classes):
            if int(name) != label:
                notes.add(BY_TEXT, f"{name}, which is label {label}")


def _append(piece: Piece, rows: BinaryIO, names: BinaryIO, ends: array, hashes: array) -> None:
    n = len(piece.origins)
    raw = [os.fsencode(origin) for origin in piece.origins]
    keys = [plain_key(origin) for origin in piece.origins]
    table = np.empty((n, COLUMNS), dtype=np.int64)
    table[:, 0], table[:, 1:3], table[:, 3] = piece.container, piece.places, piece.labels
    table[:, 4] = [len(key) > MAX_KEY for key in keys]
    rows.write(table.tobytes())
    names.write(b"".join(raw))
    start = ends[-1] if ends else 0
    ends.frombytes((start + np.cumsum([len(name) for name in raw], dtype=np.int64)).tobytes())
    digest = lambda key: int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)  # noqa: E731
    hashes.extend(map(digest, keys))


def _mark_equal(hashes: NDArray[np.int64], marks: NDArray[np.int64]) -> None:
    """Set the marks of those that are not alone with their hash."""
    ordered = np.sort(hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        nearest = np.minimum(np.searchsorted(twice, hashes), len(twice) - 1)
        marks[twice[nearest] == hashes] = 1


def plain_key(origin: str) -> str:
    """A path's parts without the suffix; dots and slashes, and what is not ASCII, as `_`."""
    folder, slash, name = origin.rpartition("/")
    return NOT_IN_KEYS.sub("_", folder + slash + (name.rpartition(".")[0] or name))


def hashed_key(origin: str, container: int = -1) -> str:
    """A key for a path whose plain key is too long or not the only one of its kind, also among several tars."""
    digest = hashlib.sha256(os.fsencode(f"{container}/{origin}" if container >= 0 else origin)).hexdigest()[:16]
    return f"{plain_key(origin)[: MAX_KEY - 17]}-{digest}"
