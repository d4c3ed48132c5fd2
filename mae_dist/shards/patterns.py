"""Many names in one: braces (`a-{000..063}.tar`), lists (`a.tar::b.tar`), and for local files globs and directories."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from mae_dist.errors import UserError
from mae_dist.shards.remote import PIPE, is_remote
from mae_dist.shards.splits import of_any_split, one_split

RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.\d+)?\}")
# fsspec writes `::` too, behind what unpacks or caches the address that follows.
CHAINED = re.compile(r"(?:[a-z0-9]+|(?:zip|tar|libarchive|reference|dir)://[^:]*)", re.IGNORECASE)


def places(patterns: Sequence[str]) -> list[str]:
    """What `patterns` stand for: URLs and commands, and local files by absolute path, which may not be there.

    Braces mean what they do in bash; those without a comma or `..` stay. Raises UserError for a range that runs
    backwards, and for a glob pattern without a match.
    """
    found: list[str] = []
    for given in patterns:
        for part in [given] if os.path.lexists(given) else split_list(given):
            found += (
                expand_braces(part) if is_remote(part) else [str(Path(name).absolute()) for name in local_files(part)]
            )
    return found


def expand_braces(pattern: str) -> list[str]:
    for found in RANGE.finditer(pattern):
        if int(found[2]) < int(found[1]):
            raise UserError(f"{pattern}: {found[0]} runs backwards; write {{{found[2]}..{found[1]}}}")
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:  # braces that nothing closes
        return [pattern]


def split_list(pattern: str) -> list[str]:
    """The parts between `::`, as webdataset takes them. Commands may hold a `::` of their own."""
    if pattern.startswith(PIPE):
        return re.split(rf"::(?={PIPE})", pattern)
    parts: list[str] = []
    for part in pattern.split("::"):
        if parts and CHAINED.fullmatch(parts[-1].rpartition("::")[2]):
            parts[-1] += f"::{part}"
        else:
            parts.append(part)
    return parts


def local_files(pattern: str) -> list[str]:
    """The local files of a pattern with braces and globs; names without a glob need not be there.

    Directories that exist are no patterns, whatever they are called. Hidden files match only where the pattern says
    so. Raises UserError for a glob without a match.
    """
    if os.path.lexists(pattern):
        return [pattern]
    known = Path()
    for part in Path(pattern).parts:
        if not os.path.lexists(known / part):
            break
        known /= part
    found: list[str] = []
    for rest in expand_braces(str(Path(pattern).relative_to(known))):
        if not glob.has_magic(rest):
            found.append(str(known / rest))
        elif matches := sorted(glob.glob(f"{glob.escape(str(known))}/{rest}", recursive=True)):  # noqa: PTH207
            found += matches
            if not of_any_split(pattern):
                one_split(pattern, list(map(Path, matches)))
        else:
            raise UserError(f"{known / rest}: matches no file")
    return found
