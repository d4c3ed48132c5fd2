"""Two network namespaces as two nodes: they train, the cable between them is cut, both give up, and the run resumes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import ADDRESSES, NoNodes, plug, two_nodes
from tests.cluster.test_pretrain import STEPS, arguments, status
from tests.conftest import losses, mae_dist

pytestmark = [pytest.mark.dist, pytest.mark.slow]
TIMEOUT = 6  # seconds, of a collective
LONG = 6 * STEPS


@pytest.fixture
def spaces() -> Iterator[list[str]]:
    try:
        with two_nodes() as names:
            yield names
    except NoNodes as error:
        pytest.skip(str(error))


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
        plug(spaces[1], "down")
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

    plug(spaces[1], "up")
    nodes = [start(spaces[i], i, shards, tmp_path, logs[i], *more) for i in range(2)]
    assert [one.wait(timeout=200) for one in nodes] == [0, 0], logs[0].read_text()
    assert "resumed at step" in logs[0].read_text()
    mae_dist(*arguments(shards, tmp_path / "quiet", *more), processes=2, timeout=200)
    assert losses(tmp_path / "t") == losses(tmp_path / "quiet" / "t")
