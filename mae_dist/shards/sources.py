"""What shards were made from, known again: a start that goes on, or finds all done, must not pass over changes."""

import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from mae_dist.errors import UserError
from mae_dist.local import regular
from mae_dist.shards.notes import CHANGED, TOUCHED, Notes

ENDS = 1 << 16  # bytes of a tar's or parquet file's two ends: names and times, or the footer that says where all lies


def stamps(directories: Iterable[str], containers: Iterable[str], labels: str | None) -> dict[str, str]:
    """By path, what `refuse_changed` compares."""
    paths = [*directories, *containers, *([labels] if labels else ())]
    return {path: stamp_of(path, whole=path == labels) for path in paths}


def stamp_of(path: str, whole: bool = False) -> str:
    """A directory's time, which changes as names come and go; size and digest of a file (`whole`: of all its bytes).

    Copies of a file have the same but for the time, the last of it. Empty for what is not there.
    """
    with suppress(OSError, ValueError):
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            return f"directory {status.st_mtime_ns}"
        ends = status.st_size if whole else ENDS
        with regular(Path(path)).open("rb") as file:
            digest = blake2b(file.read(min(ends, status.st_size)), digest_size=16)
            file.seek(max(0, status.st_size - ends))
            digest.update(file.read(min(ends, status.st_size)))
        return f"{status.st_size} bytes {digest.hexdigest()}" + ("" if whole else f" {status.st_mtime_ns}")
    return ""


def refuse_changed(before: Mapping[str, str], labels: str | None, made: str) -> Notes:
    """Notes of the directories that have changed since; what is gone is no change.

    Raises UserError for a tar, parquet or labels file that has: `made`, a directory, came from what it was.
    """
    notes = Notes()
    for path, old in before.items():
        new = stamp_of(path, whole=path == labels)
        if not old or not new or old == new:
            continue
        if old.startswith("directory"):
            notes.add(CHANGED, path)
        elif old.split()[:3] == new.split()[:3]:
            notes.add(TOUCHED, path)
        else:
            raise UserError(f"{path}: has changed since {made} was begun; remove {made} to begin anew")
    return notes
