"""Two network namespaces as two nodes: they train, the cable between them is cut, both give up, and the run resumes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_pretrain import STEPS, arguments, status
from tests.conftest import losses, mae_dist

pytestmark = [pytest.mark.dist, pytest.mark.slow]
ADDRESSES = ("10.231.7.1", "10.231.7.2")
TIMEOUT = 6  # seconds, of a collective
LONG = 6 * STEPS


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def spaces() -> Iterator[list[str]]:
    """Two namespaces with a cable between them; its end in either is called "cable"."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip (Debian: iproute2)")
    names = [f"mae-{os.getpid()}-{i}" for i in range(2)]
    try:
        ip("netns", "add", names[0])
    except AssertionError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            hosts = Path("/etc/netns") / name / "hosts"  # what `ip netns exec` shows as /etc/hosts: no waiting for DNS
            hosts.parent.mkdir(parents=True)
            hosts.write_text("".join(f"{a} {socket.gethostname()}\n" for a in ("127.0.0.1", *ADDRESSES)))
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def start(space: str, rank: int, shards: Path, runs: Path, log: Path, *more: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "mae_dist.launch", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"]
    torchrun += [f"--master-addr={ADDRESSES[0]}", "--master-port=29471", "-m", "mae_dist"]
    command = ["ip", "netns", "exec", space, *torchrun, *arguments(shards, runs, f"--train.timeout={TIMEOUT}", *more)]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "cable"}
    return subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)


def test_a_cut_cable_ends_both_nodes_in_time_and_the_run_goes_on(spaces, shards, tmp_path):
    more = [f"--train.steps={LONG}", "--train.watchdog=2", "--train.eval_every=1000"]
    logs = [tmp_path / f"log-{i}" for i in range(2)]
    nodes = [start(spaces[i], i, shards, tmp_path, logs[i], *more) for i in range(2)]
    try:
        journal, deadline = tmp_path / "t" / "journal.jsonl", time.monotonic() + 200
        while not (journal.exists() and '"step":9,' in journal.read_text()):
            assert time.monotonic() < deadline and all(n.poll() is None for n in nodes), logs[0].read_text()
            time.sleep(0.01)
        ip("-n", spaces[1], "link", "set", "cable", "down")
        cut = time.monotonic()
        took = {}
        for i, one in enumerate(nodes):
            assert one.wait(timeout=200) != 0
            took[i] = time.monotonic() - cut
    finally:
        for one in nodes:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    said = [log.read_text() for log in logs]
    for i, text in enumerate(said):
        print(f"--- node {i}, ended {took[i]:.1f} s after the cut\n" + "".join(
            line for line in text.splitlines(keepends=True) if not line.startswith("step ")))  # fmt: skip
        assert "lost the others in" in text or "ended because rank" in text
        assert "Traceback" not in text
    assert any("Timed out waiting" in text for text in said)
    assert "watchdog:" in said[0] + said[1]
    assert status(tmp_path) == "FAILED"

    ip("-n", spaces[1], "link", "set", "cable", "up")
    nodes = [start(spaces[i], i, shards, tmp_path, logs[i], *more) for i in range(2)]
    assert [one.wait(timeout=200) for one in nodes] == [0, 0], logs[0].read_text()
    assert "resumed at step" in logs[0].read_text()
    mae_dist(*arguments(shards, tmp_path / "quiet", *more), processes=2, timeout=200)
    assert losses(tmp_path / "t") == losses(tmp_path / "quiet" / "t")
