"""Two network namespaces as two nodes, with a cable between them that can be cut."""

import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.231.7.1", "10.231.7.2")
COUNT = itertools.count()


class NoNodes(Exception):
    """Why there can be none on this machine."""


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def plug(node: str, state: str) -> None:
    """The end of the cable at a node: "up" or "down"."""
    ip("-n", node, "link", "set", "cable", state)


@contextmanager
def two_nodes() -> Iterator[list[str]]:
    """The names of two namespaces; the end of the cable in either is called "cable". Raises NoNodes."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NoNodes("network namespaces need root and ip (Debian: iproute2)")
    number = next(COUNT)
    names = [f"mae-{os.getpid()}-{number}-{i}" for i in range(2)]
    try:
        ip("netns", "add", names[0])
    except AssertionError as error:
        raise NoNodes(f"no network namespaces here: {error}") from None
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            hosts = Path("/etc/netns") / name / "hosts"  # what `ip netns exec` shows as /etc/hosts: no waiting for DNS
            hosts.parent.mkdir(parents=True)
            hosts.write_text("".join(f"{a} {socket.gethostname()}\n" for a in ("127.0.0.1", *ADDRESSES)))
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            plug(name, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def can_make_nodes() -> bool:
    """Whether this user may make network namespaces here."""
    try:
        with two_nodes():
            return True
    except NoNodes:
        return False
