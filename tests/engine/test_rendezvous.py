"""Where processes meet: on one address, never in somebody else's server, and never two as the same rank."""

import socket
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from mae_dist.engine import rendezvous
from mae_dist.errors import UserError

LIMIT = timedelta(seconds=60)


@pytest.fixture(params=["silent", "talks", "hangs up"])
def stranger(request):
    """The port of a server that is no store."""
    server, lines = socket.create_server(("127.0.0.1", 0)), []

    def answer():
        while True:
            try:
                line, _ = server.accept()
            except OSError:
                return
            lines.append(line)
            if request.param == "talks":
                line.sendall(b"SSH-2.0-OpenSSH_9.2")
            elif request.param == "hangs up":
                line.close()

    threading.Thread(target=answer, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_a_stranger_on_the_port_is_found_by_all(stranger, monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.5)
    with pytest.raises(UserError, match=f"another program answers at 127.0.0.1:{stranger}.*MASTER_PORT=N"):
        rendezvous.connect("127.0.0.1", stranger, LIMIT)
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{stranger}: another program listens there"):
        rendezvous.serve("127.0.0.1", stranger, LIMIT, True)


def test_nobody_there_is_said_in_the_end():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"rank 0 cannot be reached at 127.0.0.1:{port}: Connection refused"):
        rendezvous.connect("127.0.0.1", port, timedelta(seconds=1))
    with pytest.raises(UserError, match="MASTER_ADDR=no such host: "):
        rendezvous.serve("no such host", port, LIMIT, True)


def listeners() -> set[str]:
    """Local addresses, in hex, of the sockets that listen in this network."""
    tables = [Path(f"/proc/self/net/{name}") for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables if table.exists() for row in table.read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A"}


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs /proc")
def test_it_listens_where_it_is_told_and_nowhere_else():
    store = rendezvous.serve("127.0.0.1", 0, LIMIT, True)
    mine = {address for address in listeners() if address.endswith(f":{store.port:04X}")}
    assert mine == {f"0100007F:{store.port:04X}"}
    client = rendezvous.connect("localhost", store.port, LIMIT)
    store.set("a", "b")
    assert client.get("a") == b"b"


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.7"])  # a host's own name on Debian; an address of a service
def test_it_listens_everywhere_where_others_could_not_reach_it_otherwise(host):
    with rendezvous.listen(host, 0, one_machine=False) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"


def test_two_that_take_themselves_for_the_same_or_for_another_number_are_refused():
    store = rendezvous.serve("127.0.0.1", 0, LIMIT, True)
    rendezvous.call_the_roll(store, 0, 2, "here")
    with pytest.raises(UserError, match="says that they are 2, this one says 3"):
        rendezvous.call_the_roll(store, 1, 3, "here")
    rendezvous.call_the_roll(store, 1, 2, "here")
    with pytest.raises(UserError, match="number 1 of 2 is at here already"):
        rendezvous.call_the_roll(store, 1, 2, "here")
    rendezvous.call_the_roll(store, 1, 2, "here", attempt="1")  # started again
