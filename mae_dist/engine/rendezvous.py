"""Where the processes of a run meet: torch's TCPStore, listening on one address, and never waiting for a stranger.

torch's own listens on all interfaces of a machine, whatever address it is given, and a client of it waits for ever for
somebody else's server that accepts a connection and says nothing.
"""

import errno
import os
import socket
import struct
import sys
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from mae_dist.errors import UserError

ANSWER_S = 20.0  # seconds in which a store answers; it is a thread of its own, so it does on the busiest machine
RETRY_S = 0.5  # between two tries to reach rank 0, which may start later than this process
# The first words of torch's protocol since 1.13: VALIDATE with its magic number, then GETNUMKEYS, answered by an int64.
HELLO = struct.pack("=BIB", 0, 0x3C85F7CE, 7)
MOST_KEYS = 1 << 40


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback by its own word."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def stay_on_loopback() -> None:
    """Let gloo and NCCL meet on loopback, unless told otherwise: all processes are on this machine."""
    if os.path.isdir("/sys/class/net/lo"):  # noqa: PTH112
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def listen(host: str, port: int, one_machine: bool) -> socket.socket:
    """A listening socket on `host`'s own address, and on no other. `port` 0: any free one.

    On all interfaces only where that address cannot be the one that other machines reach: it is none of this machine's
    (a service's, a NAT's), or loopback (a host's own name on Debian) although there are other machines.
    Raises UserError when the port is taken.
    """
    try:
        family, _, _, _, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), key=lambda f: f[0])
    except OSError as error:
        raise UserError(f"MASTER_ADDR={host}: {error.strerror}; write a host name that this machine knows") from None
    if not one_machine and is_loopback(str(address[0])):
        family, address = socket.AF_INET, ("", port)
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            listening.bind(address)
        except OSError as error:
            if isinstance(error, PermissionError) or _is_taken(error):
                raise
            listening.bind(("", port) if family == socket.AF_INET else ("::", port))
        listening.listen(4096)
    except OSError as error:
        listening.close()
        what = "another program listens there already" if _is_taken(error) else error.strerror
        raise UserError(
            f"rank 0 cannot listen on {host}:{port}: {what}; write another port (MASTER_PORT=N, the same on all nodes)"
        ) from None
    return listening


def _is_taken(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE


def serve(host: str, port: int, timeout: timedelta, one_machine: bool) -> TCPStore:
    """The store itself, for rank 0. Raises UserError as `listen` does."""
    listening = listen(host, port, one_machine)
    port = listening.getsockname()[1]
    return TCPStore(
        host, port, None, True, timeout, wait_for_workers=False, multi_tenant=True, master_listen_fd=listening.detach()
    )


def connect(host: str, port: int, timeout: timedelta) -> TCPStore:
    """A client of rank 0's store, which may appear within `timeout`.

    Raises UserError when it does not, or when something else answers there.
    """
    deadline, said = time.monotonic() + timeout.total_seconds(), False
    while True:
        try:
            with socket.create_connection((host, port), ANSWER_S) as line:
                _greet(line, f"{host}:{port}")
            return TCPStore(host, port, None, False, timeout, wait_for_workers=False)
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 cannot be reached at {host}:{port}: {reason}; look whether it runs there, and at MASTER_ADDR "
                "and MASTER_PORT"
            )
        if not said and time.monotonic() > deadline - timeout.total_seconds() + ANSWER_S:
            print(f"waiting for rank 0 at {host}:{port}: {reason}", file=sys.stderr, flush=True)
            said = True
        time.sleep(RETRY_S)


def _greet(line: socket.socket, where: str) -> None:
    """Raise UserError unless a store of torch's answers. Raises ConnectionError when it went away."""
    line.settimeout(ANSWER_S)
    answer = b""
    try:
        line.sendall(HELLO)
        while len(answer) < 8 and (more := line.recv(8 - len(answer))):
            answer += more
    except TimeoutError:
        pass
    if len(answer) < 8 or not 0 <= struct.unpack("=q", answer)[0] < MOST_KEYS:
        raise UserError(
            f"another program answers at {where}, where the processes of this run were to meet ({answer[:8]!r}); write "
            "another port (MASTER_PORT=N, the same on all nodes)"
        )


def call_the_roll(store: TCPStore, rank: int, size: int, where: str, attempt: str = "") -> None:
    """Raise UserError when this rank is there already, or another says that they are more or fewer."""
    others = store.compare_set(f"mae_dist/{attempt}/size", "", str(size)).decode()
    if others != str(size):
        raise UserError(
            f"another process at {where} says that they are {others}, this one says {size}; two jobs at one port? "
            "Write the same number everywhere, or another port (MASTER_PORT=N)"
        )
    if store.add(f"mae_dist/{attempt}/rank/{rank}", 1) > 1:
        raise UserError(
            f"number {rank} of {size} is at {where} already: two processes say that they are it, or two jobs meet at "
            "one port; write another RANK (NODE_RANK), or another port (MASTER_PORT=N)"
        )
