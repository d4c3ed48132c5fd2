"""What a manifest may name: a stranger's runs no command, and makes nobody read a path or another server.

A command always needs the user's word, also in a manifest of this machine: whoever wrote that may be anybody. Its other
names are only read as tars. A manifest fetched from elsewhere may name files below its own place, and no others.
"""

from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from mae_dist.errors import UserError
from mae_dist.shards import remote

ALLOW = "--data.allow_commands true"


def check_names(names: Iterable[str], manifest: str, fetched: bool = False) -> None:
    """Raise UserError for a shard that `manifest` may not name without `ALLOW`. `fetched`: it came from elsewhere."""
    for name in names:
        if name.startswith(remote.PIPE):
            what = "a command"
        elif fetched and (why := outside(name, manifest)):
            what = why
        else:
            continue
        raise UserError(
            f"{manifest}: names {what}: {name}; if you trust whoever wrote this manifest, write {ALLOW} "
            "(MAE_DIST_DATA__ALLOW_COMMANDS=true)"
        )


def outside(name: str, manifest: str) -> str:
    """What a name is that leads away from the place of `manifest`; empty for one that does not."""
    if "::" in name or "\0" in name:
        return "a chain of file systems"
    if not remote.is_remote(name):
        path = PurePosixPath(name)
        return "a path outside" if path.is_absolute() or ".." in path.parts or not path.parts else ""
    try:
        there, here = urlsplit(name), urlsplit(manifest)
        same = (there.scheme, there.hostname, there.port) == (here.scheme, here.hostname, here.port)
    except ValueError:
        return "an address that is none"
    if there.scheme in ("file", "local") or ".." in PurePosixPath(there.path).parts:
        return "a path outside"
    return "" if same else "another server"
