"""From here to OUT, which may be remote (any fsspec URL)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from mae_dist.errors import UserError
from mae_dist.shards.download import persist
from mae_dist.shards.remote import join


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
