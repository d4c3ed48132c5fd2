"""From here to OUT, which may be remote (any fsspec URL)."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from mae_dist.errors import UserError
from mae_dist.shards.download import persist
from mae_dist.shards.remote import join

MARK = ".made-from-"  # begins the name of a file in a remote OUT that is being made


def system_of(url: str) -> tuple[Any, str]:
    """The fsspec file system and the path on it. Raises UserError for a protocol that fsspec or this machine lacks."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from error


def upload(path: Path, url: str) -> None:
    """Into the remote directory, with a few tries. Raises UserError after the last, OSError if it is not here."""
    place, size = join(url, path.name), path.stat().st_size
    system, target = system_of(place)

    def put() -> None:
        system.invalidate_cache()
        system.put_file(str(path), target)
        if system.size(target) != size:
            raise OSError(f"arrived with {system.size(target)} of {size} bytes")

    try:
        persist(put, place, done="uploaded")
    except UserError:
        path.stat()  # another part may have completed OUT, and tidied up under us
        raise


@contextmanager
def named(place: str) -> Iterator[None]:
    """What file systems and their clients raise, whatever it is, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{place}: {what}; look at the place, the network and what you may do there, or write another OUT"
        ) from error


def is_empty(directory: str) -> bool:
    """Also when it is not there, local or remote. A file is not. Raises UserError when it cannot be looked at."""
    system, target = system_of(directory)
    with named(directory):
        system.invalidate_cache()  # other machines write there too
        try:
            return not system.ls(target, detail=False)
        except FileNotFoundError:
            return True


def sizes_in(directory: str) -> dict[str, int]:
    """Bytes of each file in it, local or remote; none where it is not there. Raises UserError as `is_empty`."""
    system, target = system_of(directory)
    with named(directory):
        system.invalidate_cache()
        try:
            return {info["name"].rsplit("/", 1)[-1]: info["size"] for info in system.ls(target, detail=True)}
        except FileNotFoundError:
            return {}


def claim(out: str, mark: str) -> None:
    """Say in a remote OUT who is making it, until `release`. `mark` empty: nothing to say.

    Raises UserError when another start is, with a directory of its own: neither would ever complete OUT.
    """
    name = MARK + mark
    if not mark or name in sizes_in(out):
        return
    system, target = system_of(join(out, name))
    with named(out):
        system.pipe_file(target, b"mae-dist shard is at work here\n")
    if any(other.startswith(MARK) and other != name for other in sizes_in(out)):
        release(out, mark)
        raise UserError(
            f"{out}: another mae-dist shard is making it, with another --aside; give all parts one --aside, on a disk "
            "that they share"
        )


def release(out: str, mark: str) -> None:
    """Take the mark away again."""
    system, target = system_of(join(out, MARK + mark))
    with named(out), suppress(FileNotFoundError):
        system.rm(target)


def make_directory(directory: str) -> None:
    """Raises UserError when it cannot be made."""
    system, target = system_of(directory)
    with named(directory):
        system.makedirs(target, exist_ok=True)


def read_if_there(directory: str, name: str) -> str:
    """A small file's text; empty when it is not there. Raises UserError when it cannot be read."""
    place = join(directory, name)
    system, target = system_of(place)
    with named(place):
        try:
            return system.cat_file(target).decode()
        except (FileNotFoundError, NotADirectoryError):
            return ""
