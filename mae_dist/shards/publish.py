"""From here to OUT, which may be remote (any fsspec URL)."""

import time
from pathlib import Path
from typing import Any

import fsspec

from mae_dist.errors import UserError
from mae_dist.shards.remote import join

TRIES, PAUSE = 5, 1.0  # attempts, and seconds before the second; each pause is twice as long as the one before


def system_of(url: str) -> tuple[Any, str]:
    """The fsspec file system and the path on it. Raises UserError for a protocol that fsspec or this machine lacks."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from error


def upload(path: Path, url: str) -> None:
    """Put a file into the remote directory, with a few tries. Raises the last error, an OSError of the system's."""
    system, target = system_of(join(url, path.name))
    for attempt in range(TRIES):
        try:
            system.put_file(str(path), target)
            if system.size(target) != path.stat().st_size:
                raise OSError(f"{url}: {path.name} arrived with {system.size(target)} of {path.stat().st_size} bytes")
            return
        except OSError:
            system.invalidate_cache()
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE * 2**attempt)


def is_empty(directory: str) -> bool:
    """Also when it is not there, local or remote. A file is not."""
    system, target = system_of(directory)
    system.invalidate_cache()  # other machines write there too
    try:
        return not system.ls(target, detail=False)
    except FileNotFoundError:
        return True


def make_directory(directory: str) -> None:
    system, target = system_of(directory)
    system.makedirs(target, exist_ok=True)


def read_if_there(directory: str, name: str) -> str:
    """A small file's text; empty when it is not there."""
    system, target = system_of(join(directory, name))
    try:
        return system.cat_file(target).decode()
    except (FileNotFoundError, NotADirectoryError):
        return ""
