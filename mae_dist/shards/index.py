"""Shards that somebody else made, indexed: one pass over each tar gives its manifest entry and its table.

The pass finds what tar readers skip in silence (see `tar.py`) and what webdataset would turn into other samples: a key
that comes back later in the same shard, or two files of one name.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.shards import remote
from mae_dist.shards.labels import member_label, of_unlabelled
from mae_dist.shards.manifest import FILE_NAME, Manifest, Shard, index_name
from mae_dist.shards.notes import Notes
from mae_dist.shards.processes import in_order
from mae_dist.shards.progress import Progress
from mae_dist.shards.tar import BadTar, Digested, Member, members

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
PAUSES = (0.5, 2)  # seconds before a remote shard is read again
SHOWN = 10  # broken shards listed in an error
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's: the key ends at the first dot
BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Sample:
    """What webdataset would make of some files of one key; `image` is None when none of them is one."""

    key: str
    image: Member | None
    label: int


@dataclass(frozen=True)
class Scan:
    """What one pass over a shard found."""

    shard: Shard
    rows: NDArray[np.int64]
    """(count, 3): offset, length, label of each image."""
    without_image: int
    """Samples left out of the rows."""
    notes: Notes
    """What of it is not used."""


def samples(archive: Iterator[Member], notes: Notes | None = None) -> Iterator[Sample]:
    """The samples of a tar; `notes` gets labels that are not used.

    Raises BadTar for a key that comes back or a file that comes twice.
    """
    seen: set[str] = set()
    named = ((found[1], found[2].lower(), member) for member in archive if (found := sample_name(member.name)))
    for key, group in groupby(named, key=lambda item: item[0]):
        if key in seen:
            raise BadTar(f"the files of key {key!r} do not lie together: readers see several samples")
        seen.add(key)
        files: dict[str, Member] = {}
        for _, suffix, member in group:
            if suffix in files:
                raise BadTar(f"holds {member.name!r} twice")
            files[suffix] = member
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        label = member_label({suffix: member.data for suffix, member in files.items()}, key, notes if image else None)
        yield Sample(key, image, label)


def sample_name(name: str) -> re.Match | None:
    """Key and suffix of a file, or None for what webdataset leaves out."""
    return None if "/" not in name and name.startswith("__") and name.endswith("__") else NAME.fullmatch(name)


def scan(place: str) -> Scan:
    """Read one shard from front to back. Raises BadTar or OSError."""
    rows, without, notes = [], 0, Notes()
    with remote.open_stream(place) as stream:
        digested = Digested(stream)
        for sample in samples(members(digested), notes):
            if sample.image is None:
                without += 1
            else:
                rows.append((sample.image.offset, len(sample.image.data), sample.label))
    if not rows:
        raise BadTar(f"holds no images ({', '.join(IMAGE_SUFFIXES)})")
    shard = Shard(place, len(rows), digested.num_bytes, digested.sha256.hexdigest(), md5=digested.md5.hexdigest())
    return Scan(shard, np.array(rows, dtype=np.int64), without, notes)


def expand(pattern: str) -> list[str]:
    """Every place that a pattern such as `a-{000..063}.tar` or `{train,val}-0.tar` stands for.

    Numbers keep the width they are written with; other braces stay. Raises UserError for a range that runs backwards.
    """
    for found in BRACES.finditer(pattern):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            if last < first:
                raise UserError(f"{pattern}: {found[0]} runs backwards; write {{{numbers[2]}..{numbers[1]}}}")
            choices = [f"{n:0{len(numbers[1])}d}" for n in range(first, last + 1)]
        elif "," in found[1]:
            choices = found[1].split(",")
        else:
            continue
        return [p for choice in choices for p in expand(pattern[: found.start()] + choice + pattern[found.end() :])]
    return [pattern]


@dataclass(frozen=True)
class Indexed:
    """What `index` made, and what it left out."""

    manifest: Manifest
    without_image: int
    """Samples."""
    bad: Sequence[str]
    """Shards, and what is wrong with them."""
    notes: Notes
    """What of the others is not used."""


def index(urls: Sequence[str], out: Path | None = None, workers: int = 1, max_bad: int = 0) -> Indexed:
    """Write `manifest.json` and a table for each shard into `out`.

    `urls`: brace patterns of local paths, fsspec URLs or `pipe:` commands. `out`: None for local tars of one directory
    means that directory. `max_bad`: how many broken shards to leave out. Raises UserError, listing the broken ones; the
    same call again, or after a kill, reads only what is missing.
    """
    places = [expanded if remote.is_remote(expanded) else str(Path(expanded).absolute())
              for url in urls for expanded in expand(url)]  # fmt: skip
    out = (out or directory_of(places)).absolute()
    twice = [place for place, times in Counter(places).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice; name each shard once")
    if (out / FILE_NAME).exists():
        raise UserError(f"{out / FILE_NAME}: already exists; remove it to index again, or write another --out DIR")
    out.mkdir(parents=True, exist_ok=True)
    progress = out / f".index-{sha256(chr(0).join(places).encode()).hexdigest()[:16]}.jsonl"
    done = recorded(progress)
    scans = in_order(scan_or_say, [place for place in places if place not in done], workers)
    shards, without, bad, notes = [], 0, [], Notes()
    with progress.open("w") as record, Progress(f"index {out}", len(places), unit="shards") as bar:
        record.writelines(json.dumps([asdict(shard), *rest]) + "\n" for shard, *rest in done.values())
        for place, table in zip(places, index_names(places), strict=True):
            bar.update(1)
            if place in done:
                shard, lacking, unused = done[place]
            elif isinstance(found := next(scans), str):
                bad.append(found)
                continue
            else:
                shard, lacking, unused = found.shard, found.without_image, found.notes
                np.save(out / table, found.rows)
                record.write(json.dumps([asdict(shard), lacking, unused]) + "\n")
                record.flush()
            name = Path(place).name if place == str(out / Path(place).name) else place
            shards.append(replace(shard, name=name, index="" if table == index_name(name) else table))
            without += lacking
            notes.update_from(unused)
    if bad and (len(bad) > max_bad or not shards):
        raise UserError(refusal(bad, len(places)))
    manifest = Manifest(out, shards)
    manifest.save(keep_others=True)
    progress.unlink()
    return Indexed(manifest, without, bad, of_unlabelled(notes, manifest.num_samples))


def recorded(progress: Path) -> dict[str, tuple[Shard, int, Notes]]:
    """By place, what an `index` of the same places that did not end well has done already; not what changed since."""
    lines = progress.read_text().splitlines(keepends=True) if progress.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return {
        e["name"]: (Shard(**e), lacking, Notes(*notes))
        for e, lacking, *notes in entries
        if not resized(e["name"], e["num_bytes"])
    }


def resized(place: str, num_bytes: int) -> bool:
    """Whether a shard has another size than it had, as far as that can be seen."""
    try:
        return not place.startswith(remote.PIPE) and remote.size(place) != num_bytes
    except Exception:  # file systems raise what they like
        return True


def scan_or_say(place: str) -> Scan | str:
    """The scan of a shard, or what is wrong with it.

    A remote shard has a few chances: connections break, also in the middle.
    """
    said = ""
    for pause in (*PAUSES, 0) if remote.is_remote(place) else (0,):
        try:
            return scan(place)
        except FileNotFoundError as error:
            return f"{place}: cannot be read: FileNotFoundError: {error}"
        except BadTar as error:
            said = f"{place}: {error}"
        except Exception as error:  # file systems raise what they like
            said = f"{place}: cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
        time.sleep(pause)
    return said


def directory_of(places: Sequence[str]) -> Path:
    parents = {str(Path(place).parent) for place in places if not remote.is_remote(place)}
    if len(parents) != 1 or any(map(remote.is_remote, places)):
        raise UserError("--out: not set, and the shards do not lie in one local directory; write --out DIR")
    return Path(parents.pop())


def index_names(places: Sequence[str]) -> list[str]:
    """A file name for each shard's table, with a hash of the place in front where two would be the same."""
    plain = [index_name(place) for place in places]
    times = Counter(plain)
    return [
        name if times[name] == 1 else f"{sha256(place.encode()).hexdigest()[:8]}-{name}"
        for place, name in zip(places, plain, strict=True)
    ]


def refusal(bad: Sequence[str], total: int) -> str:
    more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
    return (
        f"{len(bad)} of {total} shards cannot be used: {'; '.join(bad[:SHOWN])}{more}; "
        "copy them again, or leave them out with --max-bad N"
    )
