"""Shards that somebody else made, indexed: one pass over each tar gives its manifest entry and its table.

The pass finds what tar readers skip in silence (see `tar.py`) and what webdataset would turn into other samples (see
`samples.py`): a key that comes back later in the same shard, or two files of one name.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from mae_dist.errors import OF_THE_FILE, UserError, unreadable
from mae_dist.local import check_local, make_directory, write_file
from mae_dist.shards import remote
from mae_dist.shards.download import GIVE_UP
from mae_dist.shards.folders import only_once
from mae_dist.shards.inputs import recognise
from mae_dist.shards.labels import of_unlabelled
from mae_dist.shards.manifest import FILE_NAME, Manifest, Shard, check_table, index_name, table_bytes
from mae_dist.shards.notes import COPIES, EMPTY, UNLISTED, Notes
from mae_dist.shards.patterns import places as expand_all
from mae_dist.shards.processes import in_order
from mae_dist.shards.progress import Progress
from mae_dist.shards.samples import SUFFIXES, samples
from mae_dist.shards.sources import stamp_of
from mae_dist.shards.tar import LABELS, BadTar, Digested, members
from mae_dist.shards.trust import check_names
from mae_dist.shards.web import NotAFile
from mae_dist.urls import masked, secret_in, without_login

PAUSES = (0.5, 2)  # seconds before a remote shard is read again
SHOWN = 10  # broken shards listed in an error


@dataclass(frozen=True)
class Scan:
    """What one pass over a shard found."""

    shard: Shard
    table: bytes
    """Its index: offset, length, label of each image."""
    notes: Notes
    """What of it is not used."""


def scan(place: str) -> Scan:
    """Read one shard from front to back. Raises BadTar, OSError, and what clients do."""
    rows, notes = [], Notes()
    with remote.open_stream(place) as stream:
        digested = Digested(stream)
        for sample in samples(members(digested, lambda name: name.lower().endswith(LABELS)), notes):
            if sample.image and not sample.image.size:
                notes.add(EMPTY, sample.image.name)
            elif sample.image:
                rows.append((sample.image.offset, sample.image.size, sample.label))
        table = table_bytes(rows)
        shard = Shard.of(digested, place, table)
    if not rows:
        raise BadTar("; ".join((f"holds no images ({', '.join(SUFFIXES)})", *notes.lines())))
    return Scan(shard, table, notes)


@dataclass(frozen=True)
class Indexed:
    """What `index` made, and what it left out."""

    manifest: Manifest
    bad: Sequence[str]
    """Shards, and what is wrong with them."""
    notes: Notes
    """What of the others is not used."""


def index(
    urls: Sequence[str], out: Path | None = None, workers: int = 1, max_bad: int = 0, allow_commands: bool = False
) -> Indexed:
    """Write `manifest.json` and a table for each shard into `out`.

    `urls`: brace patterns of local paths, fsspec URLs or `pipe:` commands; or one directory with a manifest, whose
    tables and checksums are made anew from its shards. `out`: None for local tars of one directory means that
    directory. `max_bad`: how many broken shards to leave out. `allow_commands`: also run those that such a manifest
    names. Raises UserError, listing the broken ones; the same call again, or after a kill, reads only what is missing.
    """
    try:
        return _index(urls, out, workers, max_bad, allow_commands)
    except OSError as error:  # of OUT, or of all of a disk: what is wrong with one shard is in its scan
        raise unreadable(
            error, f"{error}; start the same command again to go on, or write another --out DIR"
        ) from error


def _index(urls: Sequence[str], out: Path | None, workers: int, max_bad: int, allow_commands: bool) -> Indexed:
    notes, before = Notes(), manifest_at(urls, out)
    if before:
        places, out = [before.place(i) for i in range(len(before.shards))], before.directory
        logins = places
        if not allow_commands:
            check_names(places, urls[0])
        for tar in sorted({str(path) for path in out.glob("[!.]*.tar")} - {*places}):
            notes.add(UNLISTED, tar)
    else:
        logins = [tar for place in expand_all(urls) for tar in shards_at(place, notes)]
        places = [kept(place) for place in logins]
        check_local(out or "", "--out")
        out = (out or directory_of(places)).absolute()
    twice = [place for place, times in Counter(places).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice; name each shard once")
    only_once((Path(place) for place in places if not remote.is_remote(place)), notes)
    progress = out / f".index-{sha256(os.fsencode(chr(0).join(places))).hexdigest()[:16]}.jsonl"
    listed: Manifest | None = None
    if (out / FILE_NAME).exists() and not before:
        listed = Manifest.parse((out / FILE_NAME).read_bytes(), out, str(out / FILE_NAME), sealed=False)
        others = {listed.place(i) for i in range(len(listed.shards))} - {*places}
        if others and not progress.exists():  # else it was killed just before its end
            raise UserError(
                f"{out / FILE_NAME}: already exists, and lists {min(others)}, which is not given; make it anew with: "
                f"mae-dist index {out}, or write another --out DIR"
            )
    entries = [entry_of(*pair, out) for pair in zip(places, index_names(places), strict=True)]
    manifest = before or Manifest(out, entries, listed.classes if listed else ())
    make_directory(out)
    logins = dict(zip(places, logins, strict=True))
    return scan_all(manifest, logins, progress, workers, max_bad, bool(before), notes)


def manifest_at(urls: Sequence[str], out: Path | None) -> Manifest | None:
    """The manifest of the one directory that is to be indexed again; None for anything else."""
    directory = Path(urls[0])
    if len(urls) > 1 or remote.is_remote(urls[0]) or not (directory / FILE_NAME).is_file():
        return None
    if out and out.absolute() != directory.absolute():
        raise UserError(f"--out {out}: {directory} has a manifest, which is made anew where it lies; leave --out away")
    return Manifest.parse((directory / FILE_NAME).read_bytes(), directory.absolute(), urls[0], sealed=False)


def entry_of(place: str, table: str, out: Path) -> Shard:
    """The entry of a shard that nothing is known of yet."""
    name = Path(place).name if place == str(out / Path(place).name) else place
    return Shard(name, 0, 0, "", index="" if table == index_name(name) else table)


def scan_all(
    manifest: Manifest, logins: Mapping[str, str], progress: Path, workers: int, max_bad: int, again: bool, notes: Notes
) -> Indexed:
    """Read shards, write their tables and then the manifest. `again`: they must be what it says.

    `logins`: their places as the manifest keeps them, and as they are read.
    """
    done = recorded(progress, {place: manifest.index_path(i) for i, place in enumerate(logins)}, logins)
    scans = in_order(scan_or_say, [login for place, login in logins.items() if place not in done], workers)
    shards, bad = [], []
    bar = Progress(f"index {manifest.directory}", len(logins), unit="shards")
    with progress.open("w") as record, bar, closing(scans):  # its processes end here, not with the interpreter
        record.writelines(line_of(shard, left) for shard, left in done.values())
        for i, (place, entry) in enumerate(zip(logins, manifest.shards, strict=True)):
            bar.update(1)
            if place in done:
                shard, left = done[place]
            elif isinstance(found := next(scans), str):
                bad.append(found)
                continue
            else:
                shard, left = replace(found.shard, name=place), found.notes
                if again and shard.sha256 != entry.sha256:
                    bad.append(f"{place}: not the shard that {FILE_NAME} means (its sha256 is another)")
                    continue
                write_file(manifest.index_path(i), found.table)
                record.write(line_of(shard, left))
                record.flush()
            shards.append(replace(shard, name=entry.name, index=entry.index))
            notes.update_from(left)
    if bad and (len(bad) > max_bad or not shards):
        raise UserError(refusal(bad, len(logins)))
    manifest = replace(manifest, shards=shards)
    manifest.save(keep_others=True)
    progress.unlink(missing_ok=True)
    return Indexed(manifest, bad, of_unlabelled(notes, manifest.num_samples))


def kept(place: str) -> str:
    """A place as a manifest keeps it: without user and password. Raises UserError where it holds another secret."""
    bare = without_login(place)
    if secret := secret_in(bare):
        raise UserError(
            f"{place}: a manifest would keep {secret}, and signatures expire; write the address without it (user and "
            "password of a server are read from ~/.netrc, keys of s3:// from AWS_*), or a command that reads it from "
            "the environment: 'pipe:curl -sf -H \"Authorization: Bearer $TOKEN\" https://...'"
        )
    return bare


def shards_at(place: str, notes: Notes) -> list[str]:
    """The tars of a local directory; another place is one itself. Raises UserError as `shard` does for a directory."""
    if remote.is_remote(place) or not Path(place).is_dir():
        return [place]
    source = recognise(place)
    if not source.containers or source.kind in ("class tars", "parquet"):
        raise UserError(f"{place}: no shards but {source.kind}; make shards with: mae-dist shard {place} OUT")
    source.notes.pop(COPIES, None)  # counted among the tars of all places
    notes.update_from(source.notes)
    return source.containers


def recorded(progress: Path, tables: Mapping[str, Path], logins: Mapping[str, str]) -> dict[str, tuple[Shard, Notes]]:
    """By place, what an `index` of the same places that did not end well has done already; not what changed since."""
    found = {}
    for line in progress.read_bytes().splitlines() if progress.exists() else ():
        try:
            entry, left, seen = json.loads(line)
            shard = Shard(**entry)
            check_table(tables[shard.name].read_bytes(), shard)
        except (ValueError, TypeError, KeyError, OSError):  # torn, or of an earlier version, or its table is
            continue
        if shard.index_sha256 and not changed(logins[shard.name], shard.num_bytes, seen):
            found[shard.name] = shard, Notes(left)
    return found


def line_of(shard: Shard, left: Notes) -> str:
    """A line of the progress file: what `recorded` reads. `shard` by its place."""
    seen = "" if remote.is_remote(shard.name) else stamp_of(shard.name)
    return json.dumps([asdict(shard), left, seen]) + "\n"


def changed(place: str, num_bytes: int, seen: str) -> bool:
    """Whether a shard is another than it was, as far as that can be seen. `seen`: its stamp, if it is a local file."""
    if not remote.is_remote(place):
        return stamp_of(place) != seen
    try:
        return not place.startswith(remote.PIPE) and remote.size(place) != num_bytes
    except Exception:  # file systems raise what they like
        return True


def scan_or_say(place: str) -> Scan | str:
    """The scan of a shard, or what is wrong with it.

    A remote shard has a few chances: connections break, also in the middle. Raises OSError when local storage fails,
    which says nothing of the shard.
    """
    said = ""
    for pause in (*PAUSES, 0) if remote.is_remote(place) else (0,):
        try:
            return scan(place)
        except (FileNotFoundError, PermissionError, NotAFile) as error:
            return masked(f"{place}: cannot be read: {type(error).__name__}: {error}")
        except BadTar as error:
            said = f"{place}: {error}"
        except MemoryError:  # says nothing of the shard
            raise
        except Exception as error:  # file systems raise what they like
            if isinstance(error, OSError) and not remote.is_remote(place) and error.errno not in OF_THE_FILE:
                raise OSError(error.errno, error.strerror, place) from error
            said = f"{place}: cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
            pause = max(pause, min(getattr(error, "retry_after", 0), GIVE_UP))  # a server may say how long
        time.sleep(pause)
    return masked(said)


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
        name if times[name] == 1 else f"{sha256(os.fsencode(place)).hexdigest()[:8]}-{name}"
        for place, name in zip(places, plain, strict=True)
    ]


def refusal(bad: Sequence[str], total: int) -> str:
    more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
    return (
        f"{len(bad)} of {total} shards cannot be used: {'; '.join(bad[:SHOWN])}{more}; "
        "copy them again, or leave them out with --max-bad N"
    )
